"""The FFN block of a mixture against a dense loop, in float64."""

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from loraloom.ops import slot_pieces
from loraloom.ops.expert_ffn import FfnDropout, Routing, mapped_ffn
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from tests.ops.ffn_case import (
    GATINGS,
    SHAPES,
    FfnFunction,
    assert_equals_loop,
    compute_form,
    make_case,
    run,
)


def in_groups_of(size, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            slot_pieces, "group_size", lambda _, experts, *__: size if experts % size == 0 else 1
        )
        return lean_expert_ffn(*arguments)


def grouped_expert_ffn(*arguments):
    """Slots sorted by groups of two experts, as where there are many."""
    return in_groups_of(2, arguments)


def sorted_expert_ffn(*arguments):
    """Slots sorted by expert, as in float32."""
    return in_groups_of(1, arguments)


def without_routing(x, outputs, weights, routing, gating, dropout):
    return lean_expert_ffn(x, outputs, weights, None, gating, dropout)


def without_maps(x, outputs, weights, routing, gating, dropout):
    return mapped_ffn(x, outputs, weights, gating, dropout, tokens=None)


LEAN_WAYS = [lean_expert_ffn, grouped_expert_ffn, sorted_expert_ffn]
lean_ways = pytest.mark.parametrize("ffn", LEAN_WAYS)
every_shape = pytest.mark.parametrize("shape", SHAPES)
PARTS = [
    ("gated", ["gate"]),
    ("gated", ["up"]),
    ("gated", ["down"]),
    ("gated", ["up", "down"]),
    ("ungated", ["gate"]),
    ("ungated", ["down"]),
    ("fused", ["gate_up"]),
    ("fused", ["down"]),
]


@lean_ways
@every_shape
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("top_k", "padding", "dropout"), [(1, [], 0.4), (2, [1, 4], 0.0), (2, [2], 0.4), (3, [], 0.4)]
)
def test_output_and_gradients_are_those_of_a_dense_loop(
    ffn, shape, decomposed, top_k, padding, dropout
):
    case = make_case(shape, top_k=top_k, padding=padding, dropout=dropout, decomposed=decomposed)
    assert_equals_loop(ffn, case)


@lean_ways
@pytest.mark.parametrize(("shape", "targets"), PARTS)
@pytest.mark.parametrize("decomposed", [False, True])
def test_projections_without_experts_keep_their_base_output(ffn, shape, targets, decomposed):
    assert_equals_loop(ffn, make_case(shape, targets=targets, dropout=0.4, decomposed=decomposed))


@lean_ways
@pytest.mark.parametrize("shape", ["gated", "fused"])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("num_tokens", [64, 70])
def test_pieces_do_not_change_the_result(ffn, shape, decomposed, num_tokens, monkeypatch):
    padding = [0, 63, num_tokens - 1]
    case = make_case(
        shape, num_tokens=num_tokens, dropout=0.4, padding=padding, decomposed=decomposed
    )
    monkeypatch.setattr(slot_pieces, "PIECE_BYTES", 1)
    blocks = list(slot_pieces.masked_pieces(case.selected.T, None, 8, 2, 64))
    assert len(blocks) == 2 * -(-num_tokens // 64)
    _, groups = slot_pieces.sorted_pieces(case.selected.T, 4, 2, 2, 64)
    assert sum(len(piece.rows) for piece in groups) == 2 * num_tokens
    assert max(len(piece.rows) for piece in groups) <= 64
    assert_equals_loop(ffn, case)


@every_shape
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_plain_lora_is_one_expert_of_weight_one(shape, decomposed):
    case = make_case(shape, top_k=1, num_experts=1, dropout=0.4, decomposed=decomposed)
    for ffn in (without_routing, without_maps):
        assert_equals_loop(ffn, case)


@lean_ways
def test_rows_of_one_segment_among_several_are_left_to_their_owner(ffn):
    """A base's output that is cut into segments is not written to."""
    case = make_case("gated")

    def segment(*arguments):
        hidden, finish = ffn(*arguments)
        return hidden, lambda output: finish(torch.cat([output, output]).split(len(output))[1])

    assert_equals_loop(segment, case)


def test_a_second_derivative_is_refused():
    case = make_case("gated")
    leaves = list(case.leaves.values())
    grads = torch.autograd.grad(run(lean_expert_ffn, case).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in grads).backward()


@lean_ways
def test_no_tokens_give_no_output(ffn):
    assert run(ffn, make_case("gated", num_tokens=0)).shape == (0, 5)


def test_the_base_sees_each_token_once_whatever_top_k_is():
    for top_k in (1, 2, 3):
        case = make_case("gated", top_k=top_k)
        x = case.leaves["x"]
        gate = torch.randn(5, 6, dtype=x.dtype)
        routing = Routing(case.selected, case.routing_weights)
        arguments = (x, [gate, gate], compute_form(case), routing, GATINGS["gated"], case.dropout)
        assert len(lean_expert_ffn(*arguments)[0]) == 5


class Kept:
    """What autograd holds in place of a saved tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def kept_numbers(ffn: FfnFunction, top_k: int) -> int:
    """Count the numbers that autograd keeps for the backward pass, inputs left out."""
    case = make_case("gated", top_k=top_k, num_tokens=200)
    x, gate, up = case.leaves["x"], *torch.randn(2, 200, 6, dtype=torch.float64, requires_grad=True)
    weights, routing = compute_form(case), Routing(case.selected, case.routing_weights)
    inputs = {t.untyped_storage().data_ptr() for t in (x, gate, up, *case.leaves.values())}
    refs = []

    def pack(tensor: torch.Tensor) -> Kept:
        refs.append(weakref.ref(kept := Kept(tensor)))
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        outputs = ffn(x, [gate, up], weights, routing, GATINGS["gated"], FfnDropout.none(top_k))
    storages = {
        kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes()
        for ref in refs
        if (kept := ref()) is not None
    }
    del outputs
    return sum(size for key, size in storages.items() if key not in inputs) // 8


def test_no_hidden_states_of_slots_are_kept():
    feed_forward = 200 * 6
    assert kept_numbers(lean_expert_ffn, 3) - kept_numbers(lean_expert_ffn, 1) < feed_forward
    rank_space = 200 * 4 * 4  # of a slot: gate, up, down and weighted down, of two experts
    more = kept_numbers(grouped_expert_ffn, 3) - kept_numbers(grouped_expert_ffn, 1)
    assert more < 2 * (rank_space + 200 * 3)


@lean_ways
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float32, 1e-5)])
def test_products_run_in_the_base_dtype(ffn, dtype, error, decomposed):
    case = make_case("gated", dropout=0.4, padding=[1], decomposed=decomposed)
    exact, output = run(ffn, case), run(ffn, case.to(dtype))
    assert output.dtype == dtype
    assert (output - exact).norm() < error * exact.norm()
