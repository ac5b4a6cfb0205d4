"""The FFN block without gradients: the batched twin, and the choice between the two."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from loraloom.ops import adapter_ffn as choice
from loraloom.ops.adapter_ffn import adapter_ffn
from loraloom.ops.batched_expert_ffn import batched_expert_ffn
from loraloom.ops.expert_ffn import FfnDropout, Routing, expert_ffn
from tests.ops.ffn_case import SHAPES, compute_form, dense_loop, make_case, run
from tests.ops.test_expert_ffn import PARTS

decomposed_or_not = pytest.mark.parametrize("decomposed", [False, True])


def batched(x, gate, up, weights, routing, act, dropout):
    assert dropout.probability == 0
    return batched_expert_ffn(x, gate, up, weights, routing, act)


@decomposed_or_not
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("top_k", "padding"), [(1, []), (2, [1, 4]), (3, [])])
def test_batched_output_is_that_of_a_dense_loop(shape, top_k, padding, decomposed):
    case = make_case(shape, top_k=top_k, padding=padding, decomposed=decomposed)
    with torch.no_grad():
        torch.testing.assert_close(run(batched, case), dense_loop(case), rtol=1e-10, atol=1e-10)


@decomposed_or_not
@pytest.mark.parametrize(("shape", "targets"), PARTS)
def test_batched_projections_without_experts_keep_their_base_output(shape, targets, decomposed):
    case = make_case(shape, targets=targets, padding=[2], decomposed=decomposed)
    with torch.no_grad():
        torch.testing.assert_close(run(batched, case), dense_loop(case), rtol=1e-10, atol=1e-10)


@decomposed_or_not
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batched_plain_lora_is_one_expert_of_weight_one(shape, decomposed):
    case = make_case(shape, top_k=1, num_experts=1, decomposed=decomposed)

    def without_routing(x, gate, up, weights, routing, act, dropout):
        return batched_expert_ffn(x, gate, up, weights, None, act)

    with torch.no_grad():
        output = run(without_routing, case)
        torch.testing.assert_close(output, dense_loop(case), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens_are_fine(num_tokens):
    case = make_case("gated", num_tokens=num_tokens, decomposed=True)
    with torch.no_grad():
        assert run(batched, case).shape == (num_tokens, 5)


@pytest.mark.parametrize(
    ("grad", "dropout", "limit", "taken"),
    [
        (False, 0.0, 2 * 5 * 6 * 8, "batched"),
        (False, 0.0, 2 * 5 * 6 * 8 - 1, "lean"),
        (True, 0.0, 1 << 20, "lean"),
        (False, 0.4, 1 << 20, "lean"),
    ],
)
def test_the_way_is_chosen_by_gradients_dropout_and_size(grad, dropout, limit, taken, monkeypatch):
    case, taken_ways = make_case("gated", dropout=dropout), []
    monkeypatch.setattr(choice, "BATCHED_BYTES", limit)
    for name in ("batched", "lean"):
        function = getattr(choice, f"{name}_expert_ffn")
        note = lambda *a, f=function, n=name: taken_ways.append(n) or f(*a)  # noqa: E731
        monkeypatch.setattr(choice, f"{name}_expert_ffn", note)

    def chosen(x, gate, up, weights, routing, act, masks):
        return adapter_ffn(x, gate, up, weights, routing, act, masks if dropout else None)

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run(chosen, case), dense_loop(case), rtol=1e-10, atol=1e-10)
    assert taken_ways == [taken]


def test_all_ways_see_each_token_once():
    case = make_case("gated", top_k=3)
    gate = torch.randn(5, 6, dtype=torch.float64)
    weights, routing = compute_form(case), Routing(case.selected, case.routing_weights)
    arguments = (case.leaves["x"], gate, gate, weights, routing, silu)
    with torch.no_grad():
        rows = [
            expert_ffn(*arguments, FfnDropout.none(3))[0],
            adapter_ffn(*arguments, None)[0],
            batched_expert_ffn(*arguments)[0],
        ]
    assert [len(hidden) for hidden in rows] == [5, 5, 5]
