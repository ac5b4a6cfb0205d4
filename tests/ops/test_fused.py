"""Kernels, interpreted on the CPU in float32, against a dense loop in float64."""

from functools import partial

import pytest
import torch

from loraloom.ops import lean_expert_ffn as lean
from loraloom.ops.fused.expert_ffn import expert_hidden, expert_hidden_backward
from tests.ops.ffn_case import FfnCase, FfnFunction, assert_equals_loop, make_case
from tests.ops.test_expert_ffn import without_routing

pytest.importorskip("triton", reason="kernels need Triton")
# Those whose input projections are apart.
SHAPES = ("gated", "ungated")


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(lean, "is_fused", lambda rows: True)


def assert_same(case: FfnCase, ffn: FfnFunction = lean.lean_expert_ffn) -> None:
    """Kernels don't take float64."""
    assert_equals_loop(ffn, case, 2e-4, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("top_k", "padding", "dropout"), [(1, [], 0.0), (2, [1, 4], 0.0), (3, [], 0.4)]
)
def test_output_and_gradients_are_those_of_a_dense_loop(shape, dropout, top_k, padding):
    assert_same(make_case(shape, dropout=dropout, top_k=top_k, padding=padding))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_slot_may_have_a_weight_below_one(shape):
    case = make_case(shape, top_k=1, is_switch=True)
    case.bias["down"].zero_()  # the FFN block sees to it that the output has it once
    assert_same(case)


@pytest.mark.parametrize("targets", [["gate"], ["up"], ["down"], ["up", "down"]])
def test_projections_without_experts_keep_their_base_output(targets):
    assert_same(make_case("gated", targets=targets, dropout=0.4))


@pytest.mark.parametrize(("num_tokens", "features", "rank"), [(65, 130, 2), (70, 6, 20)])
def test_tiles_at_the_edges_are_whole(num_tokens, features, rank):
    sizes = {"num_tokens": num_tokens, "features": features, "rank": rank}
    assert_same(make_case("gated", padding=[64], **sizes))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_lora_is_one_expert_of_weight_one(shape):
    case = make_case(shape, top_k=1, num_experts=1, dropout=0.4)
    assert_same(case, partial(without_routing, lean.lean_expert_ffn))


def test_operators_without_data_return_what_kernels_fill():
    gate, grad, low_rank = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 4)
    experts, weights = torch.tensor([[0, 1, -1], [1, 0, -1]]), torch.rand(3, 2)
    lora_B = torch.randn(4, 5)
    block = (gate, gate, low_rank, experts, weights, lora_B, lora_B, None)
    settings = ([0, 0], 2, 4, 1.0)
    for operator, arguments in (
        (expert_hidden, (*block, *settings, True)),
        (expert_hidden_backward, (grad, low_rank, lora_B, *block, *settings)),
    ):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
