"""Rows of a base model's experts, against a loop over tokens, experts and LoRA experts."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from loraloom.base.blocks import StackedProjection
from loraloom.ops.expert_rows import BaseExperts, ExpertUpdate, expert_rows
from loraloom.ops.expert_weights import ExpertSide, ExpertWeights
from tests.ops.ffn_case import constant

T, K, E, D, F, R = 9, 2, 4, 6, 5, 3


class Experts(torch.nn.Module):
    """Frozen stacks, as transformers keeps them."""

    def __init__(self, *, is_transposed: bool, has_bias: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.nn.Parameter:
            numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return torch.nn.Parameter(numbers, requires_grad=False)

        self.is_transposed = is_transposed
        up, down = draw(E, 2 * F, D), draw(E, D, F)
        self.gate_up_proj = up if not is_transposed else torch.nn.Parameter(up.mT.contiguous())
        self.down_proj = down if not is_transposed else torch.nn.Parameter(down.mT.contiguous())
        if has_bias:
            self.gate_up_proj_bias = draw(E, 2 * F)
            self.down_proj_bias = draw(E, D)


def gate(values: Tensor) -> Tensor:
    gates, ups = values.chunk(2, -1)
    return torch.nn.functional.silu(gates) * ups


def base_of(experts: Any) -> BaseExperts:
    up = StackedProjection(experts, "gate_up_proj", "layers.0.mlp.experts.gate_up_proj")
    down = StackedProjection(experts, "down_proj", "layers.0.mlp.experts.down_proj")
    return BaseExperts(up, down, gate)


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def make_side(
    num_groups: int, inputs: int, outputs: int, seed: int, *, is_dora: bool
) -> ExpertSide:
    row_scale = None
    if is_dora:
        row_scale = (1 + 0.1 * draw(num_groups, outputs, seed=seed + 2)).detach().requires_grad_()
    return ExpertSide(
        draw(num_groups, R, inputs, seed=seed),
        draw(num_groups, R, outputs, seed=seed + 1),
        row_scale,
    )


def make_update(tokens: Tensor | None, kind: str, seed: int) -> ExpertUpdate:
    """Make an adapter's rows, of a LoRA, a DoRA, a mixture, or factors that are shared."""
    is_dora = "dora" in kind
    num_choices = 3 if "mix" in kind else 1
    groups = num_choices * E
    up = make_side(groups, D, 2 * F, seed, is_dora=is_dora)
    down = make_side(groups, F, D, seed + 5, is_dora=is_dora)
    if kind == "shared":
        up = ExpertSide(draw(1, R, D, seed=seed), up.B)
        down = ExpertSide(down.A, draw(1, R, D, seed=seed + 1))
    count = T if tokens is None else len(tokens)
    generator = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    if "mix" in kind:
        choice = torch.rand(count, num_choices, generator=generator).argsort(1)[:, :2]
        choice[0] = -1  # padding
        weights = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        extra = {"choice": choice, "choice_weights": weights.requires_grad_()}
    if "dropout" in kind:
        num_slots = K * (2 if "mix" in kind else 1)
        keep = torch.rand(num_slots, count, F, generator=generator) > 0.3
        keep_input = torch.rand(count, D, generator=generator) > 0.3
        extra |= {
            "keep_input": constant(keep_input.double()),
            "keep_slots": [constant(mask) for mask in keep.double()],
            "dropout": 0.3,
        }
    weights = ExpertWeights(None if kind == "down" else up, down, num_choices)
    return ExpertUpdate(weights, tokens, **extra)


def project(
    base: Any, side: ExpertSide | None, group: int, x: Tensor, keep: Any, update: Any
) -> Tensor:
    """c ∘ (Wx + BAx) + b of one token in one expert."""
    expert = group % E
    bias = base.compute_bias(x.dtype)
    bias = 0 if bias is None else bias[expert]
    output = base.weight[expert] @ x
    if side is None:
        return output + bias
    dropped = x if keep is None else x * keep / (1 - update.dropout)
    lora_A = side.A[group * len(side.A) // (E * update.weights.num_choices)]
    lora_B = side.B[group * len(side.B) // (E * update.weights.num_choices)]
    output = output + (lora_A @ dropped) @ lora_B
    if side.row_scale is not None:
        output = output * side.row_scale[group]
    return output + bias


def by_loop(x: Tensor, index: Tensor, weights: Tensor, base: BaseExperts, updates: Any) -> Tensor:
    ranks = index.argsort(1).argsort(1)
    rows = []
    for token in range(T):
        owner, local = None, token
        for update in updates:
            tokens = torch.arange(T) if update.tokens is None else update.tokens
            if token in tokens.tolist():
                owner, local = update, tokens.tolist().index(token)
        slots = 1 if owner is None or owner.choice is None else owner.choice.shape[1]
        total = torch.zeros(D, dtype=torch.float64)
        for k, j in product(range(K), range(slots)):
            expert = int(index[token, k])
            chosen, share, up, down = 0, 1.0, None, None
            if owner is not None and owner.choice is not None:
                chosen, share = int(owner.choice[local, j]), owner.choice_weights[local, j]
            if owner is not None and chosen >= 0:
                up, down = owner.weights.up, owner.weights.down
            group = max(chosen, 0) * E + expert
            keep_input = keep_slot = None
            if owner is not None and owner.keep_input is not None:
                keep_input = owner.keep_input()[local]
                keep_slot = owner.keep_slots[int(ranks[token, k]) * slots + j]()[local]
            hidden = base.gating(project(base.up, up, group, x[token], keep_input, owner))
            output = project(base.down, down, group, hidden, keep_slot, owner)
            total = total + weights[token, k] * share * output
        rows.append(total)
    return torch.stack(rows)


def routed(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64).requires_grad_()
    return draw(T, D, seed=seed), index, weights


CASES = {
    "a LoRA on all tokens": (["lora"], None),
    "a LoRA on the output alone": (["down"], None),
    "LoRAs beside rows of the base": (["lora", "lora dropout"], 3),
    "a DoRA with dropout": (["dora dropout"], None),
    "a mixture in each expert": (["mix dropout"], None),
    "a mixture of DoRAs": (["mix dora dropout"], None),
    "factors that experts share": (["shared"], None),
    "all kinds": (["lora", "mix dropout", "dora"], 3),
    "all kinds and a mixture of DoRAs": (["shared", "mix dora", "down"], 2),
}


@pytest.mark.parametrize("is_transposed", [False, True], ids=["plain", "transposed with biases"])
@pytest.mark.parametrize(("kinds", "tokens_each"), CASES.values(), ids=CASES.keys())
def test_rows_and_gradients_equal_those_of_a_loop(kinds, tokens_each, is_transposed):
    experts = Experts(is_transposed=is_transposed, has_bias=is_transposed)
    base = base_of(experts)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    updates = []
    for number, kind in enumerate(kinds):
        tokens = None
        if tokens_each is not None:
            tokens = order[number * tokens_each : (number + 1) * tokens_each].sort().values
        updates.append(make_update(tokens, kind, seed=20 * (number + 1)))
    x, index, weights = routed()
    trained = [x, weights]
    for update in updates:
        for side in filter(None, (update.weights.up, update.weights.down)):
            trained += [side.A, side.B, *([] if side.row_scale is None else [side.row_scale])]
        if update.choice_weights is not None:
            trained.append(update.choice_weights)
    ours = expert_rows(x, index, weights, base, updates)
    expected = by_loop(x, index, weights, base, updates)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    grad = draw(T, D, seed=9).detach()
    gradients = torch.autograd.grad(ours, trained, grad)
    for gradient, other in zip(
        gradients, torch.autograd.grad(expected, trained, grad), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-11)
    with torch.no_grad():
        assert torch.equal(expert_rows(x, index, weights, base, updates), ours)


def test_several_adapters_of_one_kind_may_lie_in_a_stack():
    base = base_of(Experts(is_transposed=False, has_bias=False))
    x, index, weights = routed()
    tokens = torch.tensor([0, 2, 3, 6])
    entries = torch.tensor([0, 0, 1, 1])
    apart = [make_update(tokens[entries == n], "dora", seed=30 * (n + 1)) for n in (0, 1)]
    sides = []
    for name in ("up", "down"):
        pair = [getattr(update.weights, name) for update in apart]
        parts = [torch.cat([getattr(s, part) for s in pair]) for part in ("A", "B", "row_scale")]
        sides.append(ExpertSide(*parts))
    stacked = ExpertUpdate(ExpertWeights(*sides), tokens, entries=entries, num_entries=2)
    with torch.no_grad():
        expected = expert_rows(x, index, weights, base, apart)
        torch.testing.assert_close(
            expert_rows(x, index, weights, base, [stacked]), expected, rtol=0, atol=1e-12
        )
