"""The kernels in Triton's interpreter, on the CPU; `test_triton_expert_ffn.py` runs this file.

Not collected by name: Triton has to be told to interpret before it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from loraloom.ops import triton_expert_ffn as module
from loraloom.ops.expert_ffn import FfnDropout, expert_ffn
from loraloom.ops.triton_expert_ffn import Tile, Tiles, triton_expert_ffn
from tests.ops.ffn_case import SHAPES, FfnCase, dense_loop, make_case, run
from tests.ops.test_expert_ffn import PARTS, assert_same, kept_numbers

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("set TRITON_INTERPRET=1", allow_module_level=True)

every_shape = pytest.mark.parametrize("shape", SHAPES)
decomposed_or_not = pytest.mark.parametrize("decomposed", [False, True])
with_dropout = pytest.mark.parametrize("dropout", [0.0, 0.4])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    tile = Tile(tokens=16, features=16, ranks=16, num_warps=4)
    monkeypatch.setattr(module, "tiles", lambda size: Tiles(tile, tile, tile))


@decomposed_or_not
@every_shape
@with_dropout
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 1), (1, 4), (2, 3)])
def test_output_and_gradients_are_those_of_a_dense_loop(
    shape, dropout, top_k, num_experts, decomposed
):
    case = make_case(
        shape, top_k=top_k, num_experts=num_experts, dropout=dropout, decomposed=decomposed
    )
    assert_same(triton_expert_ffn, lambda: dense_loop(case), case)


@every_shape
@decomposed_or_not
def test_three_slots_and_padding(shape, decomposed):
    case = make_case(shape, top_k=3, dropout=0.4, padding=[1, 4], decomposed=decomposed)
    assert_same(triton_expert_ffn, lambda: dense_loop(case), case)


@decomposed_or_not
@pytest.mark.parametrize(("shape", "targets"), PARTS)
def test_projections_without_experts_keep_their_base_output(shape, targets, decomposed):
    case = make_case(shape, targets=targets, dropout=0.4, decomposed=decomposed)
    assert_same(triton_expert_ffn, lambda: dense_loop(case), case)


@every_shape
@decomposed_or_not
@pytest.mark.parametrize("targets", [None, "inputs"])
def test_slots_stay_apart_in_front_of_a_base_that_rounds_rows(shape, decomposed, targets):
    names = SHAPES[shape][:-1] if targets else None
    case = make_case(
        shape, dropout=0.4, padding=[1], decomposed=decomposed, rounds_rows=True, targets=names
    )
    assert_same(triton_expert_ffn, lambda: dense_loop(case), case)


@decomposed_or_not
@every_shape
def test_a_plain_lora_is_one_expert_of_weight_one(shape, decomposed):
    case = make_case(shape, top_k=1, num_experts=1, dropout=0.4, decomposed=decomposed)

    def without_routing(x, gate, up, weights, routing, act, masks):
        return triton_expert_ffn(x, gate, up, weights, None, act, masks)

    assert_same(without_routing, lambda: dense_loop(case), case)


@decomposed_or_not
@pytest.mark.parametrize("num_tokens", [16, 17, 75])
def test_tokens_need_not_fill_whole_tiles(num_tokens, decomposed):
    padding = [0, 15]
    case = make_case(
        "gated", num_tokens=num_tokens, dropout=0.4, padding=padding, decomposed=decomposed
    )
    assert_same(triton_expert_ffn, lambda: run(expert_ffn, case), case)


@pytest.mark.parametrize("programs", [1, 4])
def test_splits_of_the_sums_do_not_change_the_result(programs, monkeypatch):
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    case = make_case("gated", features=40, rank=3, num_tokens=40, dropout=0.4)
    assert_same(triton_expert_ffn, lambda: run(expert_ffn, case), case)


@pytest.mark.parametrize(("rank", "num_experts"), [(1, 4), (3, 4), (5, 4), (16, 2), (20, 2)])
def test_ranks_need_not_be_powers_of_two(rank, num_experts):
    case = make_case("gated", features=20, rank=rank, num_experts=num_experts)
    assert_same(triton_expert_ffn, lambda: run(expert_ffn, case), case)


def test_an_expert_without_tokens_gets_no_gradient():
    case = make_case("gated", num_tokens=6, dropout=0.4)
    case.selected = torch.tensor([[0, 2]] * 6)
    assert_same(triton_expert_ffn, lambda: run(expert_ffn, case), case)
    leaves = [case.leaves[f"{name}.{side}"] for name in SHAPES["gated"] for side in "AB"]
    for grad in torch.autograd.grad(run(triton_expert_ffn, case).sum(), leaves):
        assert grad[[1, 3]].count_nonzero() == 0


@pytest.mark.parametrize(
    "act",
    [
        *(ACT2FN[name] for name in ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")),
        *(silu, nn.SiLU(), nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", ["gated", "ungated"])
def test_activations_are_those_of_torch(shape, act):
    case = make_case(shape, dropout=0.4)

    def activated(ffn):
        return lambda x, gate, up, weights, routing, _, masks: ffn(
            x, gate, up, weights, routing, act, masks
        )

    assert_same(activated(triton_expert_ffn), lambda: run(activated(expert_ffn), case), case)


def test_no_hidden_states_of_slots_are_kept():
    assert kept_numbers(triton_expert_ffn, 3) - kept_numbers(triton_expert_ffn, 1) < 200 * 6


def test_a_second_derivative_is_refused():
    case = make_case("gated")
    leaves = list(case.leaves.values())
    grads = torch.autograd.grad(run(triton_expert_ffn, case).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in grads).backward()


def test_equal_inputs_give_equal_bits():
    case = make_case("gated", features=40, rank=3, num_tokens=40, dropout=0.4)
    leaves = list(case.leaves.values())
    first, again = (
        torch.autograd.grad(run(triton_expert_ffn, case).sum(), leaves) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_token_that_diverged_leaves_the_others_alone():
    case = make_case("gated", num_tokens=6)
    whole = run(triton_expert_ffn, case).detach()
    with torch.no_grad():
        case.leaves["x"][3] = torch.nan
    others = [0, 1, 2, 4, 5]
    assert torch.equal(run(triton_expert_ffn, case)[others], whole[others])


@decomposed_or_not
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.float32, 1e-5)])
def test_products_run_in_the_base_dtype(dtype, error, decomposed):
    """Not bfloat16, whose bits the interpreter multiplies as integers."""
    case = make_case("gated", dropout=0.4, padding=[1], decomposed=decomposed)
    exact = gradients(triton_expert_ffn, case)
    cast(case, dtype)
    output, *grads = gradients(triton_expert_ffn, case)
    assert output.dtype == dtype
    for ours, theirs in zip((output, *grads), exact, strict=True):
        assert (ours - theirs).norm() < error * theirs.norm()


def gradients(ffn, case: FfnCase) -> tuple[torch.Tensor, ...]:
    output = run(ffn, case)
    return output.detach(), *torch.autograd.grad(output.sum(), list(case.leaves.values()))


def cast(case: FfnCase, dtype: torch.dtype) -> None:
    case.base, case.bias = (
        {name: tensor.to(dtype) for name, tensor in tensors.items()}
        for tensors in (case.base, case.bias)
    )
    case.leaves = {
        name: leaf.detach().to(dtype).requires_grad_() for name, leaf in case.leaves.items()
    }
    masks = case.dropout
    keep_slots = [keep.to(dtype) for keep in masks.keep_slots]
    case.dropout = FfnDropout(masks.probability, masks.keep_input.to(dtype), keep_slots)
