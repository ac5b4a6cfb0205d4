from __future__ import annotations

import math

import pytest
import torch

from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import top_k_routing
from loraloom.routing.tally import (
    effective_number,
    entropy_bits,
    load_shares,
    routing_totals,
)
from tests.tiny import load_statistics


def record(num_tokens: int, seed: int = 0, top_k: int = 2) -> list[LayerRouting]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(num_tokens, 4, generator=generator) for _ in range(3)]
    return [LayerRouting(2 * n, one, *top_k_routing(one, top_k)) for n, one in enumerate(logits)]


def test_totals_of_parts_add_up_to_those_of_the_whole():
    whole = record(9)
    parts = [
        [LayerRouting(r.layer, *(t[cut] for t in (r.router_logits, *r_choices(r)))) for r in whole]
        for cut in (slice(0, 4), slice(4, 9))
    ]
    together, apart = routing_totals(whole), routing_totals(parts[0]) + routing_totals(parts[1])
    assert apart.routers == together.routers == ((0, None), (2, None), (4, None))
    assert apart.num_tokens == together.num_tokens == 9
    assert apart.tokens_per_expert.equal(together.tokens_per_expert)
    torch.testing.assert_close(apart.probabilities, together.probabilities, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        apart.token_entropies_bits, together.token_entropies_bits, rtol=1e-5, atol=0
    )


def r_choices(routing: LayerRouting):
    return routing.selected_experts, routing.routing_weights


def test_load_is_what_training_counts():
    routing = record(11)
    totals = routing_totals(routing)
    counted = load_statistics(routing).tokens_per_expert
    assert totals.tokens_per_expert.tolist() == list(counted.values())
    assert totals.load.sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_token_entropy_is_trainings_in_bits():
    routing = record(11)
    mean = float(routing_totals(routing).token_entropy_bits.mean())
    assert mean / math.log2(4) == pytest.approx(load_statistics(routing).entropy, rel=1e-6)


def test_a_layer_can_be_mixed_while_its_tokens_are_decided():
    logits = 50 * torch.eye(4)
    totals = routing_totals([LayerRouting(0, logits, *top_k_routing(logits, 1))])
    assert float(totals.token_entropy_bits) == pytest.approx(0, abs=1e-6)
    assert float(totals.mean_entropy_bits) == pytest.approx(2)
    assert float(totals.effective_experts) == pytest.approx(4)


@pytest.mark.parametrize(
    ("shares", "bits"), [([0.25] * 4, 2.0), ([1.0, 0, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 1.0)]
)
def test_the_effective_number_is_two_to_the_entropy_in_bits(shares, bits):
    assert float(entropy_bits(torch.tensor(shares))) == pytest.approx(bits)
    assert float(effective_number(torch.tensor(shares))) == pytest.approx(2**bits)


def test_shares_of_zero_counts_are_zero():
    assert load_shares(torch.tensor([[1, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0, 0]]
