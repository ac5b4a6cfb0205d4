"""Low-rank updates of a linear layer, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from loraloom.ops.low_rank import add_low_rank_, decompose, dora_norms, down_project
from tests.ops.ffn_case import constant, leaf


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_down_project_is_a_product_with_the_dropped_input(dropout):
    x, lora_A = leaf(5, 4), leaf(3, 4)
    keep = (torch.rand(5, 4) > dropout).double() if dropout else None
    factor = torch.ones(5, 4, dtype=x.dtype) if keep is None else keep / (1 - dropout)
    draw = None if keep is None else constant(keep)
    torch.testing.assert_close(down_project(x, lora_A, draw, dropout), (x * factor) @ lora_A.T)
    assert gradcheck(lambda *leaves: down_project(*leaves, draw, dropout), (x, lora_A))


@pytest.mark.parametrize("shape", [(8, 3), (2, 4, 3)])
def test_add_low_rank_adds_to_its_spans_alone(shape):
    output = torch.randn(shape, dtype=torch.float64)
    spans = [slice(1, 3), slice(5, 8)]
    low_rank, lora_B = [leaf(2, 2), leaf(3, 4)], [leaf(2, 3), leaf(4, 3)]
    expected = output.reshape(8, 3).clone()
    expected[1:3] += (low_rank[0] @ lora_B[0]).detach()
    expected[5:8] += (low_rank[1] @ lora_B[1]).detach()
    result = add_low_rank_(output, spans, low_rank, lora_B)
    torch.testing.assert_close(result.detach().reshape(8, 3), expected)
    assert result.data_ptr() == output.data_ptr()


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3)])
def test_add_low_rank_gradcheck(shape):
    spans = [slice(0, 2), slice(3, 6)]

    def function(output, *pairs):
        return add_low_rank_(output.clone(), spans, list(pairs[::2]), list(pairs[1::2]))

    assert gradcheck(function, (leaf(*shape), leaf(2, 2), leaf(2, 3), leaf(3, 4), leaf(4, 3)))


@pytest.mark.parametrize("with_bias", [True, False])
def test_decompose_scales_all_but_the_bias(with_bias):
    base, update, scale = torch.randn(3, 4, 5, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    output = base if bias is None else base + bias
    expected = scale * (base + update) + (0 if bias is None else bias)
    torch.testing.assert_close(decompose(output, update, scale, bias), expected)
    torch.testing.assert_close(
        decompose(output, update, scale[:1], bias)[0], expected[0], msg="one scale for all tokens"
    )


def test_decompose_gradcheck():
    bias = torch.randn(5, dtype=torch.float64)
    assert gradcheck(lambda *a: decompose(*a, bias), (leaf(4, 5), leaf(4, 5), leaf(1, 5)))


def norms_of(weight, lora_A, lora_B, scaling):
    return dora_norms(weight @ lora_A.mT, weight.square().sum(-1), lora_A, lora_B, scaling)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_dora_norms_are_those_of_each_dense_weight(num_experts, stack):
    weight, scaling = leaf(*stack, 6, 5), 1.7
    lora_A, lora_B = leaf(num_experts, *stack, 2, 5), leaf(num_experts, *stack, 6, 2)
    dense = weight + scaling * lora_B @ lora_A
    norms = norms_of(weight, lora_A, lora_B, scaling)
    torch.testing.assert_close(norms, dense.norm(dim=-1), rtol=1e-12, atol=1e-12)


def test_dora_norms_of_a_cancelled_row_are_zero_not_nan():
    weight = torch.randn(1, 4)
    lora_A, lora_B = weight[None], -torch.ones(1, 1, 1)
    assert norms_of(weight, lora_A, lora_B, 1.0).item() == pytest.approx(0, abs=1e-3)


def test_dora_norms_of_a_bfloat16_base_are_near_the_exact_ones():
    weight, lora_A, lora_B = torch.randn(64, 48), torch.randn(2, 4, 48) / 7, torch.randn(2, 64, 4)
    rounded = weight.bfloat16()
    exact = (rounded.double() + 2 * lora_B.double() @ lora_A.double()).norm(dim=-1)
    cross = rounded @ lora_A.bfloat16().mT
    norms = dora_norms(cross, rounded.float().square().sum(1), lora_A, lora_B, 2.0)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), exact, rtol=5e-3, atol=0)


@pytest.mark.parametrize("factor", [1.003, 0.9985, 1.01])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("with_graph", [True, False])
def test_factors_below_the_steps_of_bfloat16_are_not_lost(factor, biased, with_graph):
    output, update = torch.randn(4096, 8).bfloat16(), (0.02 * torch.randn(4096, 8)).bfloat16()
    bias = torch.full((8,), 0.5).bfloat16() if biased else None
    row_scale = torch.full((1, 8), factor, requires_grad=with_graph)
    with torch.set_grad_enabled(with_graph):
        scaled = decompose(output, update, row_scale, bias)
    assert scaled.dtype == torch.bfloat16
    shift = 0.5 if biased else 0.0
    exact = output.double() - shift + update.double()
    gain = ((scaled.detach().double() - shift) * exact).sum() / exact.square().sum()
    assert float(gain) == pytest.approx(factor, abs=3e-4)
