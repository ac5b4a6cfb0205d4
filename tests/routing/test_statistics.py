"""The signals of a router's collapse."""

from __future__ import annotations

import math

import pytest
import torch

from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import top_k_routing
from tests.tiny import load_statistics


def layer(logits, top_k: int = 1, index: int = 0) -> LayerRouting:
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return LayerRouting(index, logits, *top_k_routing(logits, top_k))


def test_tokens_per_expert_counts_every_slot_of_every_layer():
    statistics = load_statistics(
        [layer([[3, 2, 1], [1, 3, 2], [3, 2, 1]], 2), layer([[1, 2, 3]] * 3, 2, index=1)]
    )
    assert statistics.tokens_per_expert == {(0, None): [2, 3, 1], (1, None): [0, 3, 3]}


def test_routers_may_have_different_numbers_of_experts():
    routers = [layer([[3, 2, 1], [1, 3, 2]]), layer([[1, 2], [1, 2]], index=1)]
    alone = [load_statistics([router]) for router in routers]
    together = load_statistics(routers)
    assert together.tokens_per_expert == {(0, None): [1, 1, 0], (1, None): [0, 2]}
    assert together.load_cv == pytest.approx(sum(one.load_cv for one in alone) / 2)
    assert together.entropy == pytest.approx(sum(one.entropy for one in alone) / 2)


def test_a_balanced_uniform_router_has_entropy_one_and_no_spread():
    rolled = torch.eye(4) * 1e-6
    statistics = load_statistics([layer(rolled)])
    assert statistics.entropy == pytest.approx(1)
    assert statistics.load_cv == pytest.approx(0)


def test_a_collapsed_router_has_entropy_zero_and_the_largest_spread():
    statistics = load_statistics([layer([[99.0, 0, 0, 0]] * 6)])
    assert statistics.entropy == pytest.approx(0, abs=1e-6)
    assert statistics.load_cv == pytest.approx(math.sqrt(3))


def test_entropy_is_normalised_by_the_number_of_experts():
    statistics = load_statistics([layer([[50.0, 50.0, 0, 0]])])
    assert statistics.entropy == pytest.approx(0.5)


def test_values_are_means_over_layers():
    collapsed, uniform = layer([[99.0, 0], [99.0, 0]]), layer([[1e-6, 0], [0, 1e-6]])
    statistics = load_statistics([collapsed, uniform])
    assert statistics.entropy == pytest.approx(0.5)
    assert statistics.load_cv == pytest.approx(0.5)


def test_the_load_of_a_router_that_mixes_all_experts_is_their_weights():
    """Its choices would be even whatever it does."""
    logits = torch.tensor([[4.0, 0, 0], [2.0, 0, 1]])
    statistics = load_statistics([layer(logits, 3)])
    load = logits.softmax(-1).sum(0)
    assert statistics.load_cv == pytest.approx(float(load.std(correction=0) / load.mean()))
    assert statistics.tokens_per_expert == {(0, None): [2, 0, 0]}


def test_layers_without_tokens_and_single_experts_count_as_balanced():
    statistics = load_statistics([layer(torch.zeros(0, 3))])
    assert (statistics.entropy, statistics.load_cv) == (1, 0)
    assert load_statistics([layer([[1.0], [2.0]])]).entropy == 1


def test_statistics_need_no_graph():
    logits = torch.randn(5, 3, requires_grad=True)
    routing = LayerRouting(0, logits, *top_k_routing(logits, 2))
    assert isinstance(load_statistics([routing]).entropy, float)
