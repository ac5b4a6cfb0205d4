"""Router losses against the formula written out by hand."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from loraloom.adapters import MixLoraConfig
from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import TopK


def layer(logits: Tensor, top_k: int = 2, index: int = 0) -> LayerRouting:
    return LayerRouting(index, logits, *TopK(top_k)(logits))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_balance_loss_is_that_of_transformers_mixtral(top_k):
    torch.manual_seed(0)
    routing = [layer(torch.randn(30, 6), top_k, n) for n in range(3)]
    config = MixLoraConfig(num_experts=6, top_k=top_k, router_aux_loss_coef=1)
    theirs = load_balancing_loss_func(tuple(r.router_logits for r in routing), 6, top_k)
    torch.testing.assert_close(config.auxiliary_loss(routing), theirs)


def test_the_z_loss_is_the_mean_squared_logsumexp_averaged_over_layers():
    rows = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    first, second = math.log(2) ** 2, math.log(math.e + math.e**2) ** 2
    config = MixLoraConfig(num_experts=2, router_aux_loss_coef=0, router_z_loss_coef=0.5)
    routing = [layer(rows), layer(rows[:1], index=1)]
    expected = 0.5 * ((first + second) / 2 + first) / 2
    assert float(config.auxiliary_loss(routing)) == pytest.approx(expected)


@pytest.mark.parametrize("scope", ["pooled", "per_layer"])
def test_no_tokens_cost_nothing(scope):
    config = MixLoraConfig(num_experts=4, router_z_loss_coef=1, router_loss_scope=scope)
    assert float(config.auxiliary_loss([layer(torch.zeros(0, 4))])) == 0
