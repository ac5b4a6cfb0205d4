"""The low-rank arithmetic of a few tokens of several like adapters at once, without gradients.

Axes: N adapters, n token rows of each (padded to the longest), T token rows of the batch, K top_k,
I in_features, D hidden, F feed-forward, O out_features, E experts, S = E·R, P columns of a product.

The formulas of `expert_ffn.py`. A decoding step is bound by the count of operations, so the
weights of like adapters are stacked and every product is one batched product. A batch entry holds
the rows and weights of one adapter alone.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraloom.ops.expert_ffn import FfnRows, FfnWeights
from loraloom.ops.gating import Gating
from loraloom.ops.low_rank import Between, InputGroup, UpProjection, decompose
from loraloom.routing.routes import Route

# From an adapter's place in the stack to the description of its rows.
TokensOf = Callable[[int], Any]


@dataclass(frozen=True)
class StackedWeights(ABC):
    """Weights that lie adapter by adapter."""

    stacked_fields: ClassVar[tuple[str, ...]]
    """Fields with something of each adapter; the rest is the same for all."""

    def take(self, entries: slice) -> Any:
        """Return a view of the stack: adapters that lie behind one another."""
        return self.map_fields(lambda values: values[entries])

    def map_fields(self, change: Callable[[Any], Any]) -> Any:
        """Change what each field has, and what lies within it."""
        changed = {name: _changed(getattr(self, name), change) for name in self.stacked_fields}
        return replace(self, **changed)


def _changed(values: Any, change: Callable[[Any], Any]) -> Any:
    if values is None:
        return None
    if isinstance(values, Mapping):
        return {key: _changed(value, change) for key, value in values.items()}
    if isinstance(values, StackedWeights):
        return values.map_fields(change)
    return change(values)


@dataclass(frozen=True)
class StackedInput(StackedWeights):
    """Projections with one input."""

    A: Tensor  # down-projections side by side, [N, I, P]
    B: Tensor  # scaled, block-diagonal over the projections, [N, P, O]
    columns: Mapping[str, slice]  # of the update, by projection
    row_scales: Mapping[str, Tensor]  # DoRA's c by projection, [N, 1, o] float32
    groups: Sequence[InputGroup] = ()  # of each adapter, where something lies between A and B

    stacked_fields = ("A", "B", "row_scales", "groups")

    def update(self, hidden_states: Tensor, tokens: TokensOf) -> Tensor:
        """Compute every projection's update side by side, [N, n, ΣO]."""
        low_rank = torch.bmm(hidden_states, self.A)
        if self.groups:
            maps = [group.rank_inputs for group in self.groups]
            low_rank = _map_rank_space(maps, low_rank, hidden_states, tokens)
        return torch.bmm(low_rank, self.B)


def _map_rank_space(
    maps: Sequence[Between], low_rank: Tensor, hidden_states: Tensor, tokens: TokensOf
) -> Tensor:
    """Compute what lies between A and B, adapter by adapter."""
    entries = zip(maps, low_rank, hidden_states, strict=True)
    mapped = [between(z, x, tokens(index)) for index, (between, z, x) in enumerate(entries)]
    return torch.stack(mapped)


@dataclass(frozen=True)
class StackedSide(StackedWeights):
    """The B side of a projection of an FFN block."""

    columns: slice  # of the input product
    B: Tensor  # scaled, [N, S, F]
    row_scale: Tensor | None  # DoRA's, [N, E, F] float32
    bias: Tensor | None  # the base's, which DoRA leaves unscaled
    between: Sequence[Between] = ()

    stacked_fields = ("B", "row_scale", "between")

    def rank_input(self, low_rank: Tensor, hidden_states: Tensor, tokens: TokensOf) -> Tensor:
        """Return what B multiplies, from the product with all A of an input, [N, n, S]."""
        low_rank = low_rank[..., self.columns]
        if not self.between:
            return low_rank
        return _map_rank_space(self.between, low_rank, hidden_states, tokens)

    def adapt(self, output: Tensor, rank_input: Tensor, slots: _Slots | None) -> Tensor:
        """Compute the projection's output with the update, [N, n, F] or [N, n, K, F]."""
        update = _product(rank_input, self.B)
        if self.row_scale is None:
            # Added to the update, which is the step's own: slots share the base's rows.
            return update.add_(output)
        row_scale = self.row_scale
        if slots is not None and row_scale.shape[:2].numel() != 1:  # ty: ignore[missing-attribute]
            row_scale = embedding(slots.expert_numbers, row_scale.flatten(0, 1))
        return decompose(output.expand_as(update), update, row_scale, self.bias)


@dataclass(frozen=True)
class _Slots:
    """The experts of a mixture's rows, which have an axis of slots behind that of tokens."""

    selected: Tensor  # [N, n, K]
    masks: Tensor  # 1 at the columns of a slot's expert, [N, n, K, S]
    weights: Sequence[Tensor]  # K times [N, n, 1]
    num_experts: int

    def combine(self, values: Tensor) -> Tensor:
        """Compute Σ_j g_j x_j of [N, n, K, ...]."""
        slots = values.unbind(2)
        total = slots[0] * self.weights[0]
        for slot, weight in zip(slots[1:], self.weights[1:], strict=True):
            total = torch.addcmul(total, slot, weight)
        return total

    @cached_property
    def expert_numbers(self) -> Tensor:
        """Each slot's expert, counted through the experts of all adapters, [N, n, K]."""
        adapters = torch.arange(len(self.selected), device=self.selected.device)
        return self.selected + adapters[:, None, None] * self.num_experts


@dataclass(frozen=True)
class StackedFfn(StackedWeights):
    """An FFN block's weights of like adapters; those of mixtures have a router."""

    input_A: Tensor | None  # [N, D, P]
    inputs: Mapping[int, StackedSide]  # by the number of the input projection
    down_A: Tensor | None  # [N, F, P]
    down: StackedSide | None
    router: Tensor | None = None  # [N, D, E] float32; None where each projection works by itself
    expert_columns: Any = None  # 1 at the columns of each expert, [E, S]
    route: Any = None
    apart: bool = False  # slots are not added up in front of the base's output projection
    unweighted_bias: Tensor | None = None  # [O], to count once whatever weights sum to

    stacked_fields = ("input_A", "inputs", "down_A", "down", "router")

    def step(
        self, hidden_states: Tensor, outputs: Sequence[Tensor], gating: Gating, tokens: TokensOf
    ) -> FfnRows:
        """Return rows for the base's output projection and what is to be done with its output.

        All inputs are [N, n, ...]; rows are [N·n, F], or [N·n·K, F] where slots stay apart. Where
        an update is all that is added, the output is changed in place and returned.
        """
        dtype = outputs[0].dtype
        slots = None
        if self.router is not None:
            slots = self._route(hidden_states, self.router, dtype, tokens)
            outputs = [output.unsqueeze(2) for output in outputs]
        states = gating(*self._adapt_inputs(hidden_states.to(dtype), outputs, slots, tokens))
        if slots is not None and states.shape[2] == 1:  # no input projection is adapted
            states = states.expand(-1, -1, slots.masks.shape[2], -1)
        down_rank = self._reduce(states, slots, tokens)
        hidden = states if slots is None or self.apart else slots.combine(states)
        finish = partial(self._finish, down_rank, slots, states.shape[:-1])  # ty: ignore[invalid-argument-type]
        return FfnRows(hidden.reshape(-1, hidden.shape[-1]), finish)

    def _route(
        self, hidden_states: Tensor, router: Tensor, dtype: torch.dtype, tokens: TokensOf
    ) -> _Slots:
        logits = torch.bmm(hidden_states.to(router.dtype), router)
        selected, weights = self.route(logits.flatten(0, 1))
        selected = selected.view(*logits.shape[:2], selected.shape[-1])
        weights = weights.view_as(selected)
        if tokens(0).record is not None:  # views cost as much as small products do
            for index, record in enumerate(zip(logits, selected, weights, strict=True)):
                tokens(index).record_routing(*record)
        masks = embedding(selected, self.expert_columns)
        weights = weights.to(dtype).unsqueeze(-1).unbind(2)
        return _Slots(selected, masks, weights, num_experts=len(self.expert_columns))

    def _adapt_inputs(
        self,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
        slots: _Slots | None,
        tokens: TokensOf,
    ) -> Sequence[Tensor]:
        if self.input_A is None:
            return outputs
        low_rank = torch.bmm(hidden_states, self.input_A)
        adapted = []
        for number, output in enumerate(outputs):
            side = self.inputs.get(number)
            if side is not None:
                rank_input = side.rank_input(low_rank, hidden_states, tokens)
                if slots is not None:
                    rank_input = rank_input.unsqueeze(2) * slots.masks
                output = side.adapt(output, rank_input, slots)
            adapted.append(output)
        return adapted

    def _reduce(self, states: Tensor, slots: _Slots | None, tokens: TokensOf) -> Tensor | None:
        """Go to the rank space of the output projection, with slots combined if they may be."""
        if self.down_A is None or self.down is None:
            return None
        down_rank = _product(states, self.down_A)
        if slots is None:
            return self.down.rank_input(down_rank, states, tokens)
        down_rank = down_rank * slots.masks
        return down_rank if self.apart else slots.combine(down_rank)

    def _finish(
        self, down_rank: Tensor | None, slots: _Slots | None, rows_shape: torch.Size, output: Tensor
    ) -> Tensor:
        down = self.down
        if self.unweighted_bias is not None and slots is not None:
            excess: Any = sum(slots.weights)
            output = output + (excess.flatten(0, 1) - 1) * self.unweighted_bias
        if down is None or down_rank is None:
            return output
        if down.row_scale is None:
            # In place: whoever gets the same tensor back need not join the cohorts' rows.
            rows = output.view(len(down.B), -1, output.shape[-1])
            rows.baddbmm_(down_rank.flatten(1, -2), down.B)
            return output
        rows = down.adapt(output.view(*rows_shape, output.shape[-1]), down_rank, slots)
        if slots is not None:
            rows = slots.combine(rows)
        return rows.flatten(0, 1)


def _product(rows: Tensor, weights: Tensor) -> Tensor:
    """Multiply [N, n, I] or [N, n, K, I] with [N, I, O]."""
    if rows.dim() == 3:
        return torch.bmm(rows, weights)
    return torch.bmm(rows.flatten(1, 2), weights).view(*rows.shape[:-1], weights.shape[-1])


def stack_inputs(groups: Sequence[InputGroup]) -> StackedInput:
    first = groups[0]
    columns = {}
    row_scales = {}
    column = 0
    for name, side in first.projections.items():
        width = side.B.shape[1]
        columns[name] = slice(column, column + width)
        column += width
        row_scale = _stacked([group.projections[name].row_scale for group in groups])
        if row_scale is not None:
            row_scales[name] = row_scale
    sides = [[side.B for side in group.projections.values()] for group in groups]
    B = torch.stack([torch.block_diag(*matrices) for matrices in sides])
    maps = any(side.between is not None for side in first.projections.values())
    A = torch.stack([group.A.T for group in groups])
    return StackedInput(A, B, columns, row_scales, tuple(groups) if maps else ())


def stack_ffn_weights(
    weights: Sequence[FfnWeights],
    routers: Sequence[Tensor] = (),
    route: Route | None = None,
    unweighted_bias: Tensor | None = None,
) -> StackedFfn:
    """Put the FFN weights of like adapters side by side; routers are [E, D], none with E = 1."""
    first = weights[0]
    any_B = first.sides[0].B  # for its dtype and device
    experts = torch.eye(first.num_experts, dtype=any_B.dtype, device=any_B.device)
    inputs = {}
    for number in range(len(first.inputs)):
        side = _stacked_side([each.inputs[number] for each in weights])
        if side is not None:
            inputs[number] = side
    return StackedFfn(
        input_A=_stacked([each.input_A for each in weights], transposed=True),
        inputs=inputs,
        down_A=_stacked([each.down_A for each in weights], transposed=True),
        down=_stacked_side([each.down for each in weights]),
        router=_stacked(routers, transposed=True),
        expert_columns=experts.repeat_interleave(first.rank, dim=1),
        route=route,
        apart=first.apart,
        unweighted_bias=unweighted_bias,
    )


def _stacked(tensors: Sequence[Tensor | None], *, transposed: bool = False) -> Tensor | None:
    """Stack what like adapters have all of them, or none."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    return torch.stack([tensor.T for tensor in present] if transposed else present)


def _stacked_side(projections: Sequence[UpProjection | None]) -> StackedSide | None:
    sides = [side for side in projections if side is not None]
    if not sides:
        return None
    return StackedSide(
        columns=sides[0].columns,
        B=torch.stack([side.B for side in sides]),
        row_scale=_stacked([side.row_scale for side in sides]),
        bias=sides[0].bias,
        between=tuple(side.between for side in sides if side.between is not None),
    )
