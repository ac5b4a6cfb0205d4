"""What routes have in common; tests/parity holds each to its rule in whole models."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom.adapters.segment import SegmentTokens
from loraloom.ops.dropout import SampleNoise, SampleSpan
from loraloom.routing.routes import (
    Dense,
    Hybrid,
    Route,
    Switch,
    TopK,
    TopP,
    router_logits,
    tsallis_entropy,
)

LOGITS = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


ROUTES: dict[str, Route] = {
    "top_k": TopK(2),
    "top_p": TopP(0.7),
    "temperature": TopP(0.7, 0.5),
    "moe-peft": TopP(0.9, 0.8, divides_probabilities=True),
    "switch": Switch(),
    "dense": Dense(),
    "hybrid": Hybrid(0.8, 2, 1.2, 0.6, 0.05),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=list(ROUTES))
def test_experts_come_best_first_and_weights_have_the_rules_gradient(route):
    assert (route(LOGITS)[1].diff(dim=1) <= 0).all()
    scale = torch.rand(4, 5, dtype=torch.float64)

    def total(logits: Tensor) -> Tensor:
        selected, weights = route(logits)
        return (scale.gather(1, selected) * weights).sum()

    assert gradcheck(total, LOGITS[:4].clone().requires_grad_())


@pytest.mark.parametrize("index", [0.5, 1.0, 1.4, 2.0])
def test_the_entropy_is_1_for_uniform_and_0_for_certain_probabilities(index):
    p = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
    values = tsallis_entropy(p, index)
    assert values[:2].tolist() == pytest.approx([1, 0], abs=1e-9)
    near = tsallis_entropy(p[2:].float(), index + 1e-6)
    assert float(near) == pytest.approx(float(values[2]), rel=1e-4)


@pytest.mark.parametrize("index", [0.5, 1.0, 1.4])
def test_the_entropy_of_a_probability_that_underflows_has_a_gradient(index):
    logits = torch.tensor([[0.0, 200.0, 0.0, 0.0]], requires_grad=True)
    tsallis_entropy(logits.softmax(-1), index).sum().backward()
    assert logits.grad.isfinite().all()


def test_a_threshold_of_1_never_keeps_all_experts():
    logits = torch.zeros(1, 4)
    assert tsallis_entropy(logits.softmax(-1), 0.5, 0.01) > 1
    assert (Hybrid(0.5, 1, 0.5, 1.0, 0.01)(logits)[1] > 0).sum() == 2


def test_one_expert_has_the_greatest_entropy():
    assert tsallis_entropy(torch.ones(3, 1), 1.1).tolist() == [1, 1, 1]


def test_an_expert_takes_the_first_tokens_of_each_sample():
    selected = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0])
    spans = [SampleSpan(0, slice(0, 4)), SampleSpan(1, torch.tensor([5, 6, 7]))]
    tokens = SegmentTokens(0, noise=SampleNoise(spans, 8, 0, torch.device("cpu")))
    expected = [False, False, False, True, False, False, False, False]
    assert tokens.beyond_capacity(selected[:, None], 2).flatten().tolist() == expected
    assert tokens.beyond_capacity(selected[:, None], 1).sum() == 3


def test_capacity_counts_as_a_loop_over_tokens_does():
    selected = torch.randint(3, (40, 1), generator=torch.Generator().manual_seed(0))
    spans = [SampleSpan(0, slice(0, 25)), SampleSpan(1, torch.tensor([26, 30, 31, 39]))]
    tokens = SegmentTokens(0, noise=SampleNoise(spans, 40, 0, torch.device("cpu")))
    expected = torch.zeros(40, 1, dtype=torch.bool)
    for span in spans:
        counts = Counter[int]()
        for position in torch.arange(40)[span.tokens].tolist():
            counts[int(selected[position])] += 1
            expected[position] = counts[int(selected[position])] > 2
    beyond = tokens.beyond_capacity(selected, 2)
    assert beyond is not None
    assert torch.equal(beyond, expected)


def test_memory_of_capacity_grows_with_the_tokens():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            leaves = output if isinstance(output, tuple) else (output,)
            sizes.extend(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
            return output

    selected = torch.arange(1000).remainder(3).unsqueeze(1)
    noise = SampleNoise([SampleSpan(0, slice(0, 1000))], 1000, 0, torch.device("cpu"))
    with Sizes():
        SegmentTokens(0, noise=noise).beyond_capacity(selected, 2)
    assert max(sizes) == 1000


def test_extreme_logits_do_not_overflow():
    _, weights = TopK(2)(torch.tensor([[1e30, -1e30, 0.0], [300.0, 299.0, -300.0]]))
    assert weights.isfinite().all()
    assert weights.sum(-1).tolist() == pytest.approx([1, 1])


def test_a_router_computes_in_float32_on_bfloat16_states():
    torch.manual_seed(0)
    x, router = torch.randn(6, 64).bfloat16().requires_grad_(), torch.randn(5, 64)
    logits = router_logits(x, router.requires_grad_(), None)
    exact = x.double() @ router.double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert (x.grad.dtype, router.grad.dtype) == (torch.bfloat16, torch.float32)
