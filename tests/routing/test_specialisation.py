from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from loraloom.routing.record import LayerRouting
from loraloom.routing.tally import (
    loads_by_class,
    mutual_information_bits,
    specialisation_bits,
)


def record(layer: int, num_experts: int, seed: int, num_tokens: int = 40, top_k: int = 2):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    best = logits.topk(top_k)
    return LayerRouting(layer, logits, best.indices, best.values.softmax(-1))


ROUTING = [record(0, 4, seed=1), record(1, 3, seed=2)]
CLASSES = torch.tensor([0, 1, 2, 1] * 10)


def test_loads_by_class_count_every_choice():
    loads = loads_by_class(ROUTING, CLASSES, 4)
    assert loads.shape == (4, 2, 4)
    for layer, routing in enumerate(ROUTING):
        pairs = zip(CLASSES.tolist(), routing.selected_experts.tolist(), strict=True)
        counts = Counter((one, expert) for one, experts in pairs for expert in experts)
        found = {
            (one, expert): int(loads[one, layer, expert])
            for one in range(4)
            for expert in range(4)
            if loads[one, layer, expert]
        }
        assert found == counts


def test_mutual_information_is_that_of_the_definition():
    loads = loads_by_class(ROUTING, CLASSES, 3)
    for layer, bits in enumerate(mutual_information_bits(loads).tolist()):
        joint = (loads[:, layer] / loads[:, layer].sum()).tolist()
        rows, columns = [sum(row) for row in joint], [sum(c) for c in zip(*joint, strict=True)]
        expected = sum(
            p * math.log2(p / rows[one] / columns[expert])
            for one, row in enumerate(joint)
            for expert, p in enumerate(row)
            if p
        )
        assert bits == pytest.approx(expected)


def test_experts_of_their_own_tell_the_class_and_shared_ones_nothing():
    apart = torch.eye(4, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(mutual_information_bits(apart), torch.tensor([2.0]).double())
    torch.testing.assert_close(specialisation_bits(apart), torch.full((4, 1), 2.0).double())
    alike = torch.tensor([[[3.0, 1.0]], [[6.0, 2.0]]]).double()
    assert mutual_information_bits(alike).tolist() == [0]


def test_a_class_without_tokens_counts_for_nothing():
    loads = loads_by_class(ROUTING, CLASSES, 3)
    with_empty = torch.cat([loads, torch.zeros_like(loads[:1])])
    torch.testing.assert_close(mutual_information_bits(with_empty), mutual_information_bits(loads))
