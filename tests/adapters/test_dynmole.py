"""DynMoLE against the formulas of its paper and its authors' code, arXiv:2504.00661."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from loraloom.adapters import DynMoleConfig
from loraloom.errors import FormatError
from tests.adapters.plain import MASK, compare, sum_experts
from tests.blocks import names_of
from tests.tiny import changed, tiny_host

ENTROPY = {"entropy_threshold": 0.9, "entropy_index": 1.3, "entropy_eps": 1e-3}
LOSSES = {"router_entropy_loss_coef": 3.0, "router_aux_loss_coef": 2.0}
ROUTES = {"num_experts": 4, "keep_top_k": 1, "top_p": 0.6, **ENTROPY}
CONFIG = DynMoleConfig(rank=2, alpha=5, **ROUTES, **LOSSES)


class Paper:
    """The routing a token at a time."""

    def __init__(self, config: DynMoleConfig):
        self.config = config
        self.probabilities: list[Tensor] = []
        self.weights: list[Tensor] = []

    def update(self, x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        config, p = self.config, torch.softmax(x @ own["router"].T, -1)
        weights = p * torch.tensor([[self._kept(token) for token in row] for row in p.tolist()])
        self.probabilities.append(p[MASK.bool()])
        self.weights.append(weights[MASK.bool()])
        return config.alpha / config.rank * sum_experts(x, own, weights)

    def _kept(self, p: list[float]) -> list[bool]:
        config, q, num_experts = self.config, self.config.entropy_index, len(p)
        entropy = (1 - sum((value + config.entropy_eps) ** q for value in p)) / (q - 1)
        if entropy / ((1 - num_experts ** (1 - q)) / (q - 1)) > config.entropy_threshold:
            return [True] * num_experts
        order = sorted(range(num_experts), key=lambda e: -p[e])
        sums = [sum(p[e] for e in order[: n + 1]) for n in range(num_experts)]
        kept = {e for e, total in zip(order, sums, strict=True) if total <= config.top_p}
        return [e in kept or e in order[: config.keep_top_k] for e in range(num_experts)]

    def added_loss(self) -> Tensor:
        config, q = self.config, self.config.entropy_index
        p, weights = torch.cat(self.probabilities), torch.cat(self.weights)
        most = (1 - config.num_experts ** (1 - q)) / (q - 1)
        entropy = ((1 - (p + config.entropy_eps).pow(q).sum(-1)) / (q - 1) / most).mean()
        balance = config.num_experts * (weights.mean(0) * p.mean(0)).sum()
        return config.router_entropy_loss_coef * entropy + config.router_aux_loss_coef * balance

    @property
    def numbers(self) -> set[int]:
        return set((torch.cat(self.weights) > 0).sum(1).tolist())


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_logits_and_gradients_are_those_of_a_loop_over_the_experts(family):
    paper = Paper(CONFIG)
    compare(CONFIG, paper.update, family, paper.added_loss)
    assert {1, 4} <= paper.numbers


def test_more_kept_experts_than_there_are_is_an_error():
    with pytest.raises(ValidationError, match=r"keep_top_k must be in \[1, num_experts=2\], got 3"):
        DynMoleConfig(num_experts=2, keep_top_k=3)


def test_files_are_its_authors_and_are_read_back(tmp_path):
    host = tiny_host(configs={"a": CONFIG})
    host.save("a", tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert (fields["peft_type"], fields["routing_strategy"]) == ("DYNMOLE", "dynmole")
    assert (fields["keep_top_k"], fields["entropy_type"]) == (1, "tsallis")
    assert fields["entropy_eps"] == 1e-3
    targets = names_of(host.base)
    assert host.load("b", tmp_path).config == changed(CONFIG, target_modules=targets)
    path.write_text(json.dumps(fields | {"entropy_type": "renyi"}))
    with pytest.raises(FormatError, match="`entropy_type` must be tsallis, got 'renyi'"):
        host.load("c", tmp_path)
