"""Counts of where tokens go, and what they say about a router."""

import math
from collections import Counter

import pytest
import torch

from loraloom.routing.record import LayerRouting, with_tensors
from loraloom.routing.routes import TopK
from loraloom.routing.tally import (
    RoutingTotals,
    effective_number,
    entropy_bits,
    find_collapse,
    load_shares,
    loads_by_class,
    mutual_information_bits,
)


def layer(logits, top_k: int = 1, index: int = 0) -> LayerRouting:
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return LayerRouting(index, logits, *TopK(top_k)(logits))


def drawn(num_tokens: int, *sizes: int, top_k: int = 2) -> list[LayerRouting]:
    generator = torch.Generator().manual_seed(0)
    return [
        layer(torch.randn(num_tokens, size, generator=generator), top_k, 2 * index)
        for index, size in enumerate(sizes)
    ]


def test_every_slot_of_every_layer_counts():
    totals = RoutingTotals.of(
        [layer([[3, 2, 1], [1, 3, 2], [3, 2, 1]], 2), layer([[1, 2, 3]] * 3, 2, index=1)]
    )
    assert totals.choices == {(0, None): [2, 3, 1], (1, None): [0, 3, 3]}
    assert totals.load.sum(-1).tolist() == pytest.approx([1, 1])


def test_routers_may_have_different_numbers_of_experts():
    routers = [layer([[3, 2, 1], [1, 3, 2]]), layer([[1, 2], [1, 2]], index=1)]
    alone = [RoutingTotals.of([router]) for router in routers]
    together = RoutingTotals.of(routers)
    assert together.choices == {(0, None): [1, 1, 0], (1, None): [0, 2]}
    assert together.load_cv == pytest.approx(sum(one.load_cv for one in alone) / 2)
    assert together.entropy == pytest.approx(sum(one.entropy for one in alone) / 2)


@pytest.mark.parametrize(
    ("logits", "entropy", "load_cv"),
    [
        (torch.eye(4) * 1e-6, 1, 0),  # balanced and uniform
        ([[99.0, 0, 0, 0]] * 6, 0, math.sqrt(3)),  # collapsed
        ([[99.0, 0, 0, -math.inf]] * 6, 0, math.sqrt(3)),  # by a method that leaves experts out
        ([[50.0, 50.0, 0, 0]], 0.5, math.sqrt(3)),
        (torch.zeros(0, 3), 1, 0),  # no tokens
        ([[1.0], [2.0]], 1, 0),  # a single expert
    ],
)
def test_entropy_and_spread_go_from_certain_to_uniform(logits, entropy, load_cv):
    totals = RoutingTotals.of([layer(logits)])
    assert totals.entropy == pytest.approx(entropy, abs=1e-6)
    assert totals.load_cv == pytest.approx(load_cv)


def test_the_load_of_a_router_that_mixes_all_experts_is_their_weights():
    """Its choices would be even whatever it does."""
    logits = torch.tensor([[4.0, 0, 0], [2.0, 0, 1]])
    totals = RoutingTotals.of([layer(logits, 3)])
    load = logits.softmax(-1).sum(0)
    assert totals.load_cv == pytest.approx(float(load.std(correction=0) / load.mean()))
    assert totals.choices == {(0, None): [2, 0, 0]}


def test_totals_of_parts_add_up_to_those_of_the_whole():
    whole = drawn(9, 4, 4, 3)
    for one in whole:
        one.router_logits.requires_grad_()
    parts = [
        [with_tensors([one], lambda tensors, cut=cut: tensors[0][cut]) for one in whole]
        for cut in (slice(0, 4), slice(4, 9))
    ]
    together = RoutingTotals.of(whole)
    apart = RoutingTotals.of(parts[0]) + RoutingTotals.of(parts[1])
    assert apart.routers == together.routers == ((0, None), (2, None), (4, None))
    assert apart.num_tokens == together.num_tokens == 9
    torch.testing.assert_close(apart.sums, together.sums, rtol=1e-5, atol=0)


def test_a_layer_can_be_mixed_while_its_tokens_are_decided():
    totals = RoutingTotals.of([layer(50 * torch.eye(4))])
    assert float(totals.token_entropy_bits) == pytest.approx(0, abs=1e-6)
    assert float(entropy_bits(totals.mean_probabilities)) == pytest.approx(2)
    assert float(effective_number(totals.load)) == pytest.approx(4)


@pytest.mark.parametrize(
    ("shares", "bits"), [([0.25] * 4, 2.0), ([1.0, 0, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 1.0)]
)
def test_the_effective_number_is_two_to_the_entropy_in_bits(shares, bits):
    assert float(entropy_bits(torch.tensor(shares))) == pytest.approx(bits)
    assert float(effective_number(torch.tensor(shares))) == pytest.approx(2**bits)


def test_shares_of_zero_counts_are_zero():
    assert load_shares(torch.tensor([[1, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0, 0]]


ROUTING = drawn(40, 4, 3)
CLASSES = torch.tensor([0, 1, 2, 1] * 10)


def test_loads_by_class_count_every_choice():
    loads = loads_by_class(ROUTING, CLASSES, 4)
    assert loads.shape == (4, 2, 4)
    for place, routing in enumerate(ROUTING):
        pairs = zip(CLASSES.tolist(), routing.selected_experts.tolist(), strict=True)
        counts = Counter((one, expert) for one, experts in pairs for expert in experts)
        found = {
            (one, expert): int(loads[one, place, expert])
            for one in range(4)
            for expert in range(4)
            if loads[one, place, expert]
        }
        assert found == counts


def test_mutual_information_is_that_of_the_definition():
    loads = loads_by_class(ROUTING, CLASSES, 3)
    with_empty = torch.cat([loads, torch.zeros_like(loads[:1])])
    for place, bits in enumerate(mutual_information_bits(with_empty).tolist()):
        joint = (loads[:, place] / loads[:, place].sum()).tolist()
        rows, columns = [sum(row) for row in joint], [sum(c) for c in zip(*joint, strict=True)]
        expected = sum(
            p * math.log2(p / rows[one] / columns[expert])
            for one, row in enumerate(joint)
            for expert, p in enumerate(row)
            if p
        )
        assert bits == pytest.approx(expected)


EVEN = [1000] * 8
UNUSED = [1200, 1200, 1200, 1200, 1200, 1200, 800, 0]
COLLAPSED = [4000, 3900, 20, 20, 20, 20, 20, 20]


def describe(*rows: list[int], top_k: int = 2) -> str | None:
    return find_collapse({(10 + n, None): row for n, row in enumerate(rows)}, top_k)


def test_a_balanced_load_and_few_choices_are_nothing_to_speak_of():
    assert describe(EVEN, EVEN) is None
    assert describe([500, 1900, 700, 900, 1400, 1000, 1500, 100]) is None
    assert describe([10, 0, 0, 0, 0, 0, 0, 0]) is None
    assert describe([5000, 0], top_k=2) is None  # tokens take all experts


def test_unused_experts_are_named_with_their_layers():
    assert describe(EVEN, UNUSED) == (
        "1 of 16 experts are almost unused (below 2.5 % of an even share): layer 11 (expert 7)"
    )
    assert describe(*[UNUSED] * 9).endswith("layer 13 (expert 7) and 5 more")
    assert describe(UNUSED, EVEN, EVEN) is None  # a few are common


def test_a_single_layer_whose_tokens_choose_the_same_experts_is_named():
    text = describe(*[EVEN] * 20, COLLAPSED)
    assert text.startswith("6 of 168 experts are almost unused")
    assert text.endswith(": layer 30 (experts 2, 3, 4, 5, 6, 7)")
    routers = {(3, "self_attn.q_proj"): COLLAPSED, (4, "mlp.up_proj"): [900] * 4}
    assert "layer 3 self_attn.q_proj (experts 2" in find_collapse(routers, 2)
