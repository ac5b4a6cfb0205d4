"""HydraLoRA against the formula of its paper, arXiv:2404.19245, eq. 4-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraloom.adapters import HydraLoraConfig
from tests.adapters.plain import compare
from tests.tiny import tiny_host, tiny_ids

CONFIG = HydraLoraConfig(rank=2, alpha=5, num_experts=3)


def paper_update(config: HydraLoraConfig):
    def update(x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        weights = torch.softmax(x @ own["router"].T, -1)
        mixed = 0
        for expert in range(config.num_experts):
            mixed = mixed + weights[..., expert, None] * (
                x @ own["lora_A"].T @ own[f"experts.{expert}.lora_B"].T
            )
        return config.alpha / config.rank * mixed

    return update


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_logits_and_gradients_are_those_of_a_loop_over_the_experts(family):
    compare(CONFIG, paper_update(CONFIG), family)


def test_the_record_has_all_experts_best_first():
    host = tiny_host(configs={"a": CONFIG})
    with torch.no_grad():
        routing = host(tiny_ids(2), adapters=["a", "a"]).routing["a"]
    for layer in routing:
        probability = layer.router_logits.softmax(-1)
        torch.testing.assert_close(
            probability.gather(1, layer.selected_experts), layer.routing_weights
        )
        assert (layer.routing_weights.diff(dim=1) <= 0).all()
