"""Top-k routing."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from loraloom.routing.routes import router_logits, top_k_routing


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(20, 5, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_top_k_weights_sum_to_one(logits, top_k):
    _, weights = top_k_routing(logits, top_k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_weights_are_the_softmax_over_the_chosen_logits(logits, top_k):
    selected, weights = top_k_routing(logits, top_k)
    torch.testing.assert_close(weights, logits.gather(1, selected).softmax(-1))


def test_the_most_probable_experts_are_chosen_best_first(logits):
    selected, weights = top_k_routing(logits, 3)
    assert torch.equal(selected, logits.argsort(-1, descending=True)[:, :3])
    assert (weights.diff(dim=-1) <= 0).all()


def test_all_experts_of_a_uniform_router_weigh_the_same():
    _, weights = top_k_routing(torch.zeros(3, 4), 4)
    assert weights.tolist() == [[0.25] * 4] * 3


def test_weights_have_gradient(logits):
    upstream = torch.randn(20, 2, dtype=torch.float64)
    function = lambda z: (top_k_routing(z, 2)[1] * upstream).sum()  # noqa: E731
    assert gradcheck(function, logits.requires_grad_())


def test_extreme_logits_do_not_overflow():
    _, weights = top_k_routing(torch.tensor([[1e30, -1e30, 0.0], [300.0, 299.0, -300.0]]), 2)
    assert weights.isfinite().all()
    assert weights.sum(-1).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("with_jitter", [False, True])
def test_router_logits_are_a_product(with_jitter):
    torch.manual_seed(0)
    x, router = torch.randn(4, 3).double().requires_grad_(), torch.randn(5, 3).double()
    jitter = torch.rand(4, 3).double() + 0.5 if with_jitter else None
    expected = (x if jitter is None else x * jitter) @ router.T
    torch.testing.assert_close(router_logits(x, router, jitter), expected)
    assert gradcheck(lambda *leaves: router_logits(*leaves, jitter), (x, router.requires_grad_()))


def test_a_router_computes_in_float32_on_bfloat16_states():
    torch.manual_seed(0)
    x, router = torch.randn(6, 64).bfloat16().requires_grad_(), torch.randn(5, 64)
    logits = router_logits(x, router.requires_grad_(), None)
    exact = x.double() @ router.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert (x.grad.dtype, router.grad.dtype) == (torch.bfloat16, torch.float32)
