"""HydraLoRA against the formula of its paper, arXiv:2404.19245, eq. 4-5."""

import pytest
import torch
from torch import Tensor

from loraloom.adapters import HydraLoraConfig
from tests.adapters.plain import compare, sum_experts

CONFIG = HydraLoraConfig(rank=2, alpha=5, num_experts=3)


def paper_update(config: HydraLoraConfig):
    def update(x: Tensor, own: dict[str, Tensor], key: str) -> Tensor:
        weights = torch.softmax(x @ own["router"].T, -1)
        own = own | {f"experts.{e}.lora_A": own["lora_A"] for e in range(config.num_experts)}
        return config.alpha / config.rank * sum_experts(x, own, weights)

    return update


@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_logits_and_gradients_are_those_of_a_loop_over_the_experts(family):
    compare(CONFIG, paper_update(CONFIG), family)
