"""Like adapters' FFN blocks in one batched pass, against each alone in a dense loop, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from loraloom.ops.stacked import StackedFfn, stack_ffn_weights
from loraloom.routing.routes import TopK
from tests.ops.ffn_case import (
    GATINGS,
    SHAPES,
    FfnCase,
    compute_form,
    dense_loop,
    make_case,
)
from tests.ops.test_expert_ffn import PARTS

decomposed_or_not = pytest.mark.parametrize("decomposed", [False, True])


def cases_of_two_adapters(shape: str, **options) -> list[FfnCase]:
    """Two adapters' cases on one base; the second has other weights, tokens and choices."""
    first, second = make_case(shape, **options), make_case(shape, **options)
    leaves = {name: leaf.detach().roll(1, 0) * 1.3 for name, leaf in second.leaves.items()}
    return [first, replace(second, leaves=leaves, selected=first.selected.roll(1, 0))]


def stack(cases: list[FfnCase], *, routed: bool) -> StackedFfn:
    parts = [compute_form(case) for case in cases]
    if not routed:
        return stack_ffn_weights(parts)
    routers = [_router(case).T for case in cases]
    return stack_ffn_weights(parts, routers, TopK(cases[0].selected.shape[1]))


@dataclass
class Recorder:
    """Takes the choices of an adapter's router."""

    selected: Tensor | None = None
    record = True

    def record_routing(self, router_logits: Tensor, selected: Tensor, weights: Tensor) -> None:
        self.selected = selected


def run(cases: list[FfnCase], *, routed: bool) -> tuple[list[Tensor], list[Recorder]]:
    """Outputs, and what routers chose."""
    base, bias = cases[0].base, cases[0].bias
    x = torch.stack([case.leaves["x"] for case in cases])
    project = lambda name: x @ base[name].T + bias[name]  # noqa: E731
    outputs = [project(name) for name in SHAPES[cases[0].shape][:-1]]
    recorders = [Recorder() for _ in cases]
    gating = GATINGS[cases[0].shape]
    rows, finish = stack(cases, routed=routed).step(x, outputs, gating, recorders.__getitem__)
    output = finish(rows @ base["down"].T + bias["down"])
    return list(output.view(*x.shape[:2], output.shape[-1])), recorders


def follow_router(cases: list[FfnCase]) -> list[FfnCase]:
    """Give the cases the choices that their routers make."""
    followed = []
    for case in cases:
        logits = case.leaves["x"] @ _router(case)
        chosen, selected = logits.topk(case.selected.shape[1])
        followed.append(
            replace(case, selected=selected, leaves={**case.leaves, "slot_logits": chosen})
        )
    return followed


@torch.no_grad()
def check(cases: list[FfnCase], *, routed: bool = True) -> None:
    """Outputs are a dense loop's."""
    cases = follow_router(cases) if routed else cases
    outputs, recorders = run(cases, routed=routed)
    for output, case, recorder in zip(outputs, cases, recorders, strict=True):
        assert recorder.selected.equal(case.selected) if routed else recorder.selected is None
        torch.testing.assert_close(output, dense_loop(case), rtol=1e-10, atol=1e-10)


@decomposed_or_not
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixtures_are_those_of_a_dense_loop(shape, top_k, decomposed):
    check(cases_of_two_adapters(shape, top_k=top_k, decomposed=decomposed))


@decomposed_or_not
@pytest.mark.parametrize(("shape", "targets"), PARTS)
def test_projections_without_experts_keep_their_base_output(shape, targets, decomposed):
    check(cases_of_two_adapters(shape, targets=targets, decomposed=decomposed))


@decomposed_or_not
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_adapters_are_one_expert_of_weight_one(shape, decomposed):
    check(cases_of_two_adapters(shape, top_k=1, num_experts=1, decomposed=decomposed), routed=False)


@torch.no_grad()
def test_one_adapter_alone_and_no_tokens():
    check([make_case("gated")])
    assert run([make_case("gated", num_tokens=0)], routed=True)[0][0].shape == (0, 5)


def _router(case: FfnCase) -> Tensor:
    """A router, [D, E], that depends on the case's own weights."""
    generator = torch.Generator().manual_seed(int(case.leaves["x"].sum().item() * 1e6) % 2**31)
    shape = (case.leaves["x"].shape[1], case.num_experts)
    return torch.randn(shape, generator=generator, dtype=torch.float64)
