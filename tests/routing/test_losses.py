"""Router losses against the formula written out by hand."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from loraloom.adapters import MixLoraConfig
from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import TopK
from tests.tiny import changed


def layer(logits: Tensor, top_k: int = 2, index: int = 0) -> LayerRouting:
    return LayerRouting(index, logits, *TopK(top_k)(logits))


def by_hand(logits: Tensor, top_k: int) -> float:
    """E · Σ_j Σ_n f[j, n] · P[n], one token at a time."""
    num_tokens, num_experts = logits.shape
    share = [[0.0] * num_experts for _ in range(top_k)]
    probability = [0.0] * num_experts
    for row in logits.tolist():
        exponentials = [math.exp(value) for value in row]
        for slot, expert in enumerate(sorted(range(num_experts), key=lambda n: -row[n])[:top_k]):
            share[slot][expert] += 1 / num_tokens
        for expert, value in enumerate(exponentials):
            probability[expert] += value / sum(exponentials) / num_tokens
    products = (f * p for slot in share for f, p in zip(slot, probability, strict=True))
    return num_experts * sum(products)


@pytest.fixture
def routing():
    torch.manual_seed(0)
    return [layer(torch.randn(30, 6).double() + torch.arange(6) * n, 2, n) for n in range(3)]


def test_the_balance_loss_is_the_formula_pooled_or_averaged_over_layers(routing):
    config = MixLoraConfig(num_experts=6, router_aux_loss_coef=0.25)
    pooled = torch.cat([r.router_logits for r in routing])
    assert float(config.auxiliary_loss(routing)) == pytest.approx(0.25 * by_hand(pooled, 2))
    per_layer = changed(config, router_loss_scope="per_layer")
    mean = sum(by_hand(r.router_logits, 2) for r in routing) / 3
    assert float(per_layer.auxiliary_loss(routing)) == pytest.approx(0.25 * mean)


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
