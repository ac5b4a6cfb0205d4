"""The low-rank arithmetic of a few tokens of several like adapters at once, without gradients.

Axes: N adapters, n token rows of each (padded to the longest), T token rows of the batch, K top_k,
I in_features, D hidden, F feed-forward, O out_features, E experts, S = E·R, P columns of a product.

The same numbers as `expert_ffn.py`. A decoding step is bound by the count of operations, so the
weights of like adapters are stacked and every product is one batched product. A batch entry holds
the rows and weights of one adapter alone.
"""

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraloom.ops.expert_ffn import FfnWeights, combine_slots
from loraloom.ops.gating import Gating
from loraloom.ops.low_rank import Between, InputGroup, UpProjection, decompose
from loraloom.routing.routes import Route

# From an adapter's place in the stack to the description of its rows.
TokensOf = Callable[[int], Any]


@dataclass(frozen=True)
class Entries(ABC):
    """Weights that lie adapter by adapter, of which some can be taken and others put behind."""

    by_entry: ClassVar[tuple[str, ...]]
    """Fields with something of each adapter; the others are the same for all."""

    def take(self, entries: slice | Sequence[int]) -> Any:
        """Return the stack of some adapters; of those in a slice it is a view."""
        return _by_entry(lambda values: _taken(values, entries), self)

    def followed_by(self, other: Any) -> Any:
        return _by_entry(_behind, self, other)


def _by_entry(change: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Change what lies entry by entry in stacks of like adapters: all have it, or none has."""
    if isinstance(first, Entries):
        fields = {name: [vars(one)[name] for one in (first, *others)] for name in first.by_entry}
        return replace(first, **{n: _by_entry(change, *values) for n, values in fields.items()})
    if isinstance(first, Mapping):
        return {n: _by_entry(change, *(one[n] for one in (first, *others))) for n in first}
    return None if first is None else change(first, *others)


def _behind(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) else (*first, *second)


def _taken(values: Any, entries: slice | Sequence[int]) -> Any:
    if isinstance(values, Tensor) or isinstance(entries, slice):
        return values[entries]
    return tuple(values[entry] for entry in entries if values)  # none has any, or all have


@dataclass(frozen=True)
class StackedInput(Entries):
    """Projections with one input."""

    A: Tensor  # down-projections side by side, [N, I, P]
    B: Tensor  # scaled, block-diagonal over the projections, [N, P, O]
    columns: Mapping[str, slice]  # of the update, by projection
    row_scales: Mapping[str, Tensor]  # DoRA's c by projection, [N, 1, o] float32
    sources: Sequence[InputGroup] = ()  # their own, where something lies between A and B

    by_entry = ("A", "B", "row_scales", "sources")

    def update(self, hidden_states: Tensor, tokens: TokensOf) -> Tensor:
        """Compute every projection's update side by side, [N, n, ΣO]."""
        low_rank = torch.bmm(hidden_states, self.A)
        if self.sources:
            entries = enumerate(zip(self.sources, low_rank, hidden_states, strict=True))
            low_rank = torch.stack(
                [group.rank_inputs(z, x, tokens(index)) for index, (group, z, x) in entries]
            )
        return torch.bmm(low_rank, self.B)


@dataclass(frozen=True)
class StackedSide(Entries):
    """The B side of a projection of an FFN block."""

    columns: slice  # of the input product
    B: Tensor  # scaled, [N, S, F]
    row_scale: Tensor | None  # DoRA's, [N, E, F] float32
    bias: Tensor | None  # the base's, which DoRA leaves unscaled
    between: Sequence[Between] = ()

    by_entry = ("B", "row_scale", "between")


# From the base's output projection of a block's hidden states to the block's output, [N·n, D].
# Where nothing else is asked of it, the output is changed in place and returned.
Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StackedFfn(Entries):
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

    by_entry = ("input_A", "inputs", "down_A", "down", "router")

    def step(
        self,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
        gating: Gating,
        tokens: TokensOf,
    ) -> tuple[Tensor, Finish]:
        """Return rows for the base's output projection and what is to be done with its output.

        All inputs are [N, n, ...]; rows are [N·n, F], or [N·n·K, F] where slots stay apart.
        """
        step = _Step(self, hidden_states, outputs, gating, tokens)
        return step.hidden, step.finish


class _Step:
    """A pass through a block; a mixture's rows have an axis of slots behind that of tokens."""

    def __init__(
        self,
        weights: StackedFfn,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
        gating: Gating,
        tokens: TokensOf,
    ):
        self.weights = weights
        self.tokens = tokens
        self.masks = None
        dtype = outputs[0].dtype
        if weights.router is not None:
            self._route(hidden_states, weights.router, dtype)
            outputs = [output.unsqueeze(2) for output in outputs]
        low_rank, hidden_states = None, hidden_states.to(dtype)
        if weights.input_A is not None:
            low_rank = torch.bmm(hidden_states, weights.input_A)
        adapted = []
        for number, output in enumerate(outputs):
            side = weights.inputs.get(number)
            rank_input = self._rank_input(side, low_rank, hidden_states)
            adapted.append(self._adapted(output, rank_input, side))
        states = gating(*adapted)
        if self.masks is not None and states.shape[2] == 1:  # no input projection is adapted
            states = states.expand(-1, -1, self.masks.shape[2], -1)
        self.rows_shape = states.shape[:-1]
        self.down_rank = None if weights.down_A is None else self._reduce(states, weights.down_A)
        hidden = states if self.masks is None or weights.apart else self._combined(states)
        self.hidden = hidden.reshape(-1, hidden.shape[-1])

    def finish(self, output: Tensor) -> Tensor:
        weights, down = self.weights, self.weights.down
        if weights.unweighted_bias is not None:
            excess = sum(self.slot_weights).flatten(0, 1) - 1  # pyright: ignore
            output = output + excess * weights.unweighted_bias
        if down is not None and self.down_rank is not None:
            if down.row_scale is None:
                # In place: whoever gets the same tensor back need not join the cohorts' rows.
                rows = output.view(len(down.B), -1, output.shape[-1])
                rows.baddbmm_(self.down_rank.flatten(1, -2), down.B)
            else:
                rows = output.view(*self.rows_shape, output.shape[-1])
                output = self._adapted(rows, self.down_rank, down).flatten(0, -2)
        if self.masks is None or not weights.apart:
            return output
        return self._combined(output.view(*self.rows_shape, output.shape[-1])).flatten(0, 1)

    def _route(self, hidden_states: Tensor, router: Tensor, dtype: torch.dtype) -> None:
        """Choose experts, [N, n, K], with their masks and weights."""
        logits = torch.bmm(hidden_states.to(router.dtype), router)
        selected, slot_weights = self.weights.route(logits.flatten(0, 1))
        self.selected = selected.view(*logits.shape[:2], selected.shape[-1])
        slot_weights = slot_weights.view_as(self.selected)
        if self.tokens(0).record is not None:  # views cost as much as small products do
            for index, record in enumerate(zip(logits, self.selected, slot_weights, strict=True)):
                self.tokens(index).record_routing(*record)
        self.masks = embedding(self.selected, self.weights.expert_columns)  # (N, n, K, S)
        self.slot_weights = slot_weights.to(dtype).unsqueeze(-1).unbind(2)

    def _rank_input(
        self, side: StackedSide | None, low_rank: Tensor | None, hidden_states: Tensor
    ) -> Tensor | None:
        if side is None or low_rank is None:
            return None
        rank_input = self._between(side, low_rank, hidden_states)
        return rank_input if self.masks is None else rank_input.unsqueeze(2) * self.masks

    def _between(self, side: StackedSide, low_rank: Tensor, hidden_states: Tensor) -> Tensor:
        low_rank = low_rank[..., side.columns]
        if not side.between:
            return low_rank
        entries = enumerate(zip(side.between, low_rank, hidden_states, strict=True))
        return torch.stack([between(z, x, self.tokens(n)) for n, (between, z, x) in entries])

    def _adapted(
        self, output: Tensor, rank_input: Tensor | None, side: StackedSide | None
    ) -> Tensor:
        if rank_input is None or side is None:
            return output
        update = _product(rank_input, side.B)
        if side.row_scale is None:
            # Added to the update, which is the step's own: slots share the base's rows.
            return update.add_(output)
        factors = side.row_scale
        if self.masks is not None and factors.shape[:2].numel() != 1:
            factors = embedding(self._factors_of, factors.flatten(0, 1))
        return decompose(output.expand_as(update), update, factors, side.bias)

    @cached_property
    def _factors_of(self) -> Tensor:
        """The place of each slot's factors among those of all adapters, [N, n, K]."""
        adapters = torch.arange(len(self.selected), device=self.selected.device)
        return self.selected + adapters[:, None, None] * len(self.weights.expert_columns)

    def _reduce(self, states: Tensor, down_A: Tensor) -> Tensor:
        """Go to the rank space of the output projection, with slots combined if they may be."""
        down_rank = _product(states, down_A)
        if self.masks is None:
            down: Any = self.weights.down
            return self._between(down, down_rank, states)
        down_rank = down_rank * self.masks
        return down_rank if self.weights.apart else self._combined(down_rank)

    def _combined(self, slots: Tensor) -> Tensor:
        return combine_slots(slots.unbind(2), self.slot_weights)


def _product(rows: Tensor, weights: Tensor) -> Tensor:
    """Multiply [N, n, I] or [N, n, K, I] with [N, I, O]."""
    if rows.dim() == 3:
        return torch.bmm(rows, weights)
    return torch.bmm(rows.flatten(1, 2), weights).view(*rows.shape[:-1], weights.shape[-1])


def stack_inputs(groups: Sequence[InputGroup]) -> StackedInput:
    first = groups[0]
    sizes = [side.B.shape for side in first.projections.values()]
    B = first.A.new_zeros(len(groups), *map(sum, zip(*sizes, strict=True)))
    columns, row_scales, row, column = {}, {}, 0, 0
    for name, (num_rows, width) in zip(first.projections, sizes, strict=True):
        sides = [group.projections[name] for group in groups]
        columns[name] = slice(column, column + width)
        B[:, row : row + num_rows, columns[name]] = torch.stack([side.B for side in sides])
        row, column = row + num_rows, column + width
        scale = _stacked([side.row_scale for side in sides])
        row_scales |= {} if scale is None else {name: scale}
    maps = any(side.between is not None for side in first.projections.values())
    A = torch.stack([group.A.T for group in groups])
    return StackedInput(A, B, columns, row_scales, tuple(groups) if maps else ())


def stack_ffn_weights(
    parts: Sequence[FfnWeights],
    routers: Sequence[Tensor] = (),
    route: Route | None = None,
    unweighted_bias: Tensor | None = None,
) -> StackedFfn:
    """Put the FFN weights of like adapters side by side; routers are [E, D], none with E = 1."""
    first = parts[0]
    some = first.sides[0].B  # for its dtype and device
    experts = torch.eye(first.num_experts, dtype=some.dtype, device=some.device)
    return StackedFfn(
        input_A=_stacked([part.input_A for part in parts], transposed=True),
        inputs=_stacked_inputs([part.inputs for part in parts]),
        down_A=_stacked([part.down_A for part in parts], transposed=True),
        down=_stacked_side([part.down for part in parts]),
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


def _stacked_inputs(parts: Sequence[Sequence[UpProjection | None]]) -> dict[int, StackedSide]:
    """Stack the sides of each input projection that is adapted."""
    sides = {number: _stacked_side(sides) for number, sides in enumerate(zip(*parts, strict=True))}
    return {number: side for number, side in sides.items() if side is not None}


def _stacked_side(parts: Sequence[UpProjection | None]) -> StackedSide | None:
    sides = [part for part in parts if part is not None]
    if not sides:
        return None
    return StackedSide(
        columns=sides[0].columns,
        B=torch.stack([side.B for side in sides]),
        row_scale=_stacked([side.row_scale for side in sides]),
        bias=sides[0].bias,
        between=tuple(side.between for side in sides if side.between is not None),
    )
