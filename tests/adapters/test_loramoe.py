"""LoRAMoE against the formulas of its paper, arXiv:2312.09979, eq. 4-7; see tests/parity too."""

import pytest
import torch
from torch import Tensor

from loraloom.adapters import LoraMoeConfig
from loraloom.adapters.loramoe import balancing_constraint
from loraloom.adapters.segment import SampleTokens
from loraloom.data.tokens import Example
from loraloom.training.client import Request, run_requests
from loraloom.training.settings import SftConfig
from tests.adapters.plain import MASK, compare, sum_experts
from tests.tiny import changed, tiny_host

CONFIG = LoraMoeConfig(rank=2, alpha=5, num_experts=3, balance_coef=2.0, balance_delta=0.3)


class Paper:
    """All experts of an FFN projection mixed; one LoRA on attention's."""

    def __init__(self, config: LoraMoeConfig):
        self.config = config
        self.weights: list[Tensor] = []

    def update(self, x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        scaling = self.config.alpha / self.config.rank
        if "lora_A" in own:
            return scaling * x @ own["lora_A"].T @ own["lora_B"].T
        weights = torch.softmax(x @ own["router"].T, -1)
        self.weights.append(weights[MASK.bool()])
        return scaling * sum_experts(x, own, weights)

    def added_loss(self) -> Tensor:
        """Of all tokens as one sample of group 0."""
        losses = [
            constraint(weights, [(len(weights), 0)], self.config.balance_delta)
            for weights in self.weights
        ]
        return self.config.balance_coef * sum(losses) / len(losses)


def constraint(weights: Tensor, samples: list[tuple[int, int]], delta: float) -> Tensor:
    values, start = [], 0
    for length, group in samples:
        for expert in range(weights.shape[1]):
            own_group = int(expert >= (weights.shape[1] + 1) // 2)
            factor = 1 + delta if own_group == group else 1 - delta
            values.append(factor * weights[start : start + length, expert].sum())
        start += length
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_logits_and_gradients_are_those_of_a_loop_over_the_experts(family):
    paper = Paper(CONFIG)
    compare(CONFIG, paper.update, family, paper.added_loss)


@pytest.mark.parametrize("delta", [0.0, 0.4])
def test_the_constraint_is_the_papers_for_samples_of_two_groups(delta):
    weights = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = [(4, 0), (3, 1), (2, 0)]
    lengths = [length for length, _ in samples]
    groups = torch.tensor([group for _, group in samples])
    actual = balancing_constraint(weights, lengths, groups, delta)
    torch.testing.assert_close(actual, constraint(weights, samples, delta))


def test_weight_decomposition_is_of_attention_alone():
    host = tiny_host(configs={"a": changed(CONFIG, weight_decomposition=True)})
    magnitudes = [name for name in host.adapters["a"].tensors() if name.endswith("magnitude")]
    assert {name.split(".")[2] for name in magnitudes} == {"self_attn"}


def test_a_step_tells_whose_tokens_are_whose(monkeypatch):
    host, seen = tiny_host(configs={"a": CONFIG}, dtype=torch.float32), []
    monkeypatch.setattr(
        LoraMoeConfig,
        "auxiliary_loss",
        lambda _, routing, samples, add_up: seen.append((len(routing[0].router_logits), samples)),
    )
    data = [Example((5, 6, 7, 8), (5, 6, 7, 8), 0, expert_group=1), Example((9, 10), (9, 10), 1)]
    request = Request("a", data, SftConfig())
    run_requests(host, [request], pad_id=0)
    assert seen == [(6, [SampleTokens(4, 1), SampleTokens(2, 0)])]
