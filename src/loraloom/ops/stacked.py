"""The low-rank arithmetic of a few tokens of several like adapters at once, without gradients.

Axes: N adapters, n token rows of each (padded to the longest), T token rows of the batch, K top_k,
I in_features, D hidden, F feed-forward, O out_features, E experts, S = E·R, P columns of a product.

The same numbers as `expert_ffn.py` and `low_rank_ffn.py`. A decoding step is bound by the count of
operations, so the weights of like adapters are stacked and every product is one batched product: no
sort, no loop over experts, and over adapters only where a method does something of its own between
A and B. A batch entry holds the rows and weights of one adapter alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraloom.ops.expert_ffn import Activation, FfnWeights, are_halves, combine_slots
from loraloom.ops.low_rank import Between, InputGroup, UpProjection, decompose
from loraloom.routing.routes import Route

# From an adapter's place in the stack to the description of its rows.
TokensOf = Callable[[int], Any]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Entries(ABC):
    """Weights that lie adapter by adapter, of which some can be taken and others put behind."""

    by_entry: ClassVar[tuple[str, ...]]
    """Fields with something of each adapter; the others are the same for all."""

    def take(self, entries: slice | Sequence[int]) -> Any:
        """Return the stack of some adapters; of those in a slice it is a view."""
        return _by_entry(lambda values: _taken(values, entries), self)

    def followed_by(self, other: Any) -> Any:
        """Return the stack of these adapters and of other ones that are like them."""
        return _by_entry(
            lambda *both: torch.cat(both) if isinstance(both[0], Tensor) else (*chain(*both),),
            self,
            other,
        )


def _by_entry(change: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Change what lies entry by entry in stacks of like adapters: all have it, or none has."""
    if isinstance(first, Entries):
        fields = {name: [vars(one)[name] for one in (first, *others)] for name in first.by_entry}
        return replace(first, **{n: _by_entry(change, *values) for n, values in fields.items()})
    if isinstance(first, Mapping):
        return {n: _by_entry(change, *(one[n] for one in (first, *others))) for n in first}
    return None if first is None else change(first, *others)


def _taken(values: Any, entries: slice | Sequence[int]) -> Any:
    if isinstance(values, Tensor) or isinstance(entries, slice):
        return values[entries]
    return tuple(values[entry] for entry in entries if values)  # none has any, or all have


@dataclass(frozen=True)
class StackedInput(Entries):
    """Projections with one input.

    Args:
        A: Down-projections side by side, [N, I, P].
        B: Scaled up-projections, block-diagonal over the projections, [N, P, O].
        columns: Each projection's columns of the update, by name.
        row_scales: DoRA's factors c by name, [N, 1, o] float32; empty without DoRA.
        sources: The adapters' own weights, where something lies between A and B. That runs entry by
            entry.
    """

    A: Tensor
    B: Tensor
    columns: Mapping[str, slice]
    row_scales: Mapping[str, Tensor]
    sources: Sequence[InputGroup] = ()

    by_entry = ("A", "B", "row_scales", "sources")

    def update(self, hidden_states: Tensor, tokens: TokensOf) -> Tensor:
        """Compute every projection's update side by side, [N, n, ΣO].

        Args:
            hidden_states: [N, n, I], in the dtype of A.
            tokens: Describes an entry's rows.
        """
        low_rank = torch.bmm(hidden_states, self.A)
        if self.sources:
            entries = enumerate(zip(self.sources, low_rank, hidden_states, strict=True))
            low_rank = torch.stack(
                [group.rank_inputs(z, x, tokens(index)) for index, (group, z, x) in entries]
            )
        return torch.bmm(low_rank, self.B)


@dataclass(frozen=True)
class StackedSide(Entries):
    """The B side of an FFN's input projection.

    Args:
        columns: Its columns of the input product.
        B: Scaled up-projections, [N, S, F].
        row_scale: DoRA's factors, [N, E, F] float32; None without DoRA.
        bias: The base's bias, which DoRA leaves unscaled.
        between: What each adapter does between A and B; empty where none does anything.
    """

    columns: slice
    B: Tensor
    row_scale: Tensor | None
    bias: Tensor | None
    between: Sequence[Between] = ()

    by_entry = ("B", "row_scale", "between")


# From the base's output projection of a block's hidden states to the block's output, [N·n, D].
# Where nothing else is asked of it, the output is changed in place and returned.
Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StackedFfn(Entries):
    """An FFN block's weights of like adapters.

    Args:
        input_A: Down-projections of the block's input, [N, D, P].
        gate: B side of the gate (or only) input projection.
        up: B side of up.
        down_A: Down-projections of the hidden states, [N, F, P].
        down: B side of the output projection.
    """

    input_A: Tensor | None
    gate: StackedSide | None
    up: StackedSide | None
    down_A: Tensor | None
    down: StackedSide | None

    by_entry = ("input_A", "gate", "up", "down_A", "down")

    @abstractmethod
    def step(
        self,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: TokensOf,
    ) -> tuple[Tensor, Finish]:
        """Begin a pass.

        Args:
            hidden_states: The block's input, [N, n, D].
            gate: Base output of the gate, or of the only input projection, [N, n, F].
            up: Base output of up, [N, n, F], or None.
            act: The base's activation.
            tokens: Describes an adapter's rows, and takes the record of its routers.

        Returns:
            Rows for the base's output projection, [N·n, F], or [N·n·K, F] where slots stay apart;
            and what is to be done with its output.
        """


class StackedLowRankFfn(StackedFfn):
    """Weights of adapters that work on each projection by itself."""

    def step(
        self,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: TokensOf,
    ) -> tuple[Tensor, Finish]:
        hidden_states = hidden_states.to(gate.dtype)
        low_rank = None if self.input_A is None else torch.bmm(hidden_states, self.input_A)
        gate_rank = _rank_input(self.gate, low_rank, hidden_states, tokens)
        states = act(_adapted(gate, gate_rank, self.gate))
        if up is not None:
            up_rank = gate_rank
            if not are_halves(self.gate, self.up):
                up_rank = _rank_input(self.up, low_rank, hidden_states, tokens)
            states = states * _adapted(up, up_rank, self.up)
        down = self.down
        down_rank = None if self.down_A is None else torch.bmm(states, self.down_A)
        rank_input = _rank_input(down, down_rank, states, tokens)

        def finish(output: Tensor) -> Tensor:
            if down is None or rank_input is None:
                return output
            if down.row_scale is None:
                return _add_update_(output, rank_input, down.B)
            update = torch.bmm(rank_input, down.B)
            rows = output.view_as(update)
            return decompose(rows, update, down.row_scale, down.bias).flatten(0, 1)

        return states.flatten(0, 1), finish


def _rank_input(
    side: StackedSide | None, low_rank: Tensor | None, hidden_states: Tensor, tokens: TokensOf
) -> Tensor | None:
    """Return what a projection's B multiplies, [N, n, S]; None where it is not adapted."""
    if side is None or low_rank is None:
        return None
    low_rank = low_rank[..., side.columns]
    if not side.between:
        return low_rank
    entries = enumerate(zip(side.between, low_rank, hidden_states, strict=True))
    return torch.stack([between(z, x, tokens(index)) for index, (between, z, x) in entries])


def _add_update_(output: Tensor, rank_input: Tensor, lora_B: Tensor) -> Tensor:
    """Add what B makes of [N, n, S] to the base's output, [N·n, O]."""
    rows = output.view(len(lora_B), -1, output.shape[-1])
    rows.baddbmm_(rank_input, lora_B)
    return output


def _adapted(output: Tensor, rank_input: Tensor | None, side: StackedSide | None) -> Tensor:
    """Adapt an input projection, [N, n, F]."""
    if rank_input is None or side is None:
        return output
    update = torch.bmm(rank_input, side.B)
    if side.row_scale is None:
        return update.add_(output)
    return decompose(output, update, side.row_scale, side.bias)


@dataclass(frozen=True)
class StackedExpertFfn(StackedFfn):
    """Weights of mixtures whose router chooses experts of a whole block.

    Args:
        router: [N, D, E] float32.
        expert_columns: 1 at the columns of each expert, [E, S].
        route: What routers do with their logits.
        apart: Slots are not added up in front of the base's output projection.
        unweighted_bias: The output projection's bias, [O], which its output has once instead of
            times the sum of a token's weights; None where that is the same.
    """

    router: Tensor
    expert_columns: Tensor
    route: Route
    apart: bool
    unweighted_bias: Tensor | None = None

    by_entry = (*StackedFfn.by_entry, "router")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.expert_columns)

    def step(
        self,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: TokensOf,
    ) -> tuple[Tensor, Finish]:
        step = _ExpertStep(self, hidden_states, gate, up, act, tokens)
        return step.hidden, step.finish


class _ExpertStep:
    def __init__(self, weights: StackedExpertFfn, hidden_states, gate, up, act, tokens: TokensOf):
        self.weights = weights
        selected, slot_weights = self._route(hidden_states, tokens)
        self._masks = embedding(selected, weights.expert_columns)  # (N, n, K, S)
        self._slot_weights = list(slot_weights.to(gate.dtype).unsqueeze(-1).unbind(2))
        self._selected = selected
        low_rank = None
        if weights.input_A is not None:
            low_rank = torch.bmm(hidden_states.to(gate.dtype), weights.input_A)
        states = act(self._project(gate, low_rank, weights.gate))
        if up is not None:
            states = states * self._project(up, low_rank, weights.up)
        if states.shape[2] == 1:  # neither gate nor up is adapted
            states = states.expand(-1, -1, selected.shape[2], -1)
        self._slot_shape = states.shape[:-1]
        self._down_rank = self._reduce(states)
        hidden = states if weights.apart else self._combined(states)
        self.hidden = hidden.reshape(-1, hidden.shape[-1])

    def finish(self, output: Tensor) -> Tensor:
        weights, down = self.weights, self.weights.down
        if weights.unweighted_bias is not None:
            excess = sum(self._slot_weights).flatten(0, 1) - 1  # pyright: ignore
            output = output + excess * weights.unweighted_bias
        if down is not None and self._down_rank is not None:
            rank_input = self._down_rank.flatten(1, -2)
            if down.row_scale is None:
                output = _add_update_(output, rank_input, down.B)
            else:
                update = torch.bmm(rank_input, down.B)
                rows = update.view(*self._slot_shape, update.shape[-1])
                factors = self._factors(down.row_scale, rows)
                output = decompose(output.view_as(rows), rows, factors, down.bias)
        if not weights.apart:
            return output
        return self._combined(output.view(*self._slot_shape, output.shape[-1])).flatten(0, 1)

    def _route(self, hidden_states: Tensor, tokens: TokensOf) -> tuple[Tensor, Tensor]:
        """Choose experts and their weights, both [N, n, K]."""
        router = self.weights.router
        logits = torch.bmm(hidden_states.to(router.dtype), router)
        selected, slot_weights = self.weights.route(logits.flatten(0, 1))
        selected = selected.view(*logits.shape[:2], selected.shape[-1])
        slot_weights = slot_weights.view_as(selected)
        if tokens(0).record is not None:  # views cost as much as small products do
            for index, record in enumerate(zip(logits, selected, slot_weights, strict=True)):
                tokens(index).record_routing(*record)
        return selected, slot_weights

    def _project(self, output: Tensor, low_rank: Tensor | None, side: StackedSide | None) -> Tensor:
        """Adapt an input projection: [N, n, K, F], or [N, n, 1, F] where it is not adapted."""
        output = output.unsqueeze(2)
        if low_rank is None or side is None:
            return output
        masked = low_rank[..., side.columns].unsqueeze(2) * self._masks
        update = torch.bmm(masked.flatten(1, 2), side.B)
        update = update.view(*masked.shape[:-1], side.B.shape[-1])
        if side.row_scale is None:
            return update.add_(output)
        factors = self._factors(side.row_scale, update)
        return decompose(output.expand_as(update), update, factors, side.bias)

    def _factors(self, row_scale: Tensor, rows: Tensor) -> Tensor:
        """DoRA's factors of every row's adapter and expert."""
        if row_scale.shape[:2].numel() == 1:
            return row_scale.expand_as(rows)
        return embedding(self._factors_of, row_scale.flatten(0, 1))

    @cached_property
    def _factors_of(self) -> Tensor:
        """The place of each slot's factors among those of all adapters, [N, n, K]."""
        adapters = torch.arange(len(self._selected), device=self._selected.device)
        return self._selected + adapters[:, None, None] * self.weights.num_experts

    def _reduce(self, states: Tensor) -> Tensor | None:
        """Go to the rank space of the output projection, [N, n, [K,] S], combined if it may be."""
        if self.weights.down_A is None:
            return None
        down_rank = torch.bmm(states.flatten(1, 2), self.weights.down_A)
        down_rank = down_rank.view(self._masks.shape) * self._masks
        return down_rank if self.weights.apart else self._combined(down_rank)

    def _combined(self, slots: Tensor) -> Tensor:
        """Add up the slots by their weights, [N, n, ...]."""
        return combine_slots(slots.unbind(2), self._slot_weights)


def stack_inputs(groups: Sequence[InputGroup]) -> StackedInput:
    """Put like adapters' projections of one input side by side."""
    first = groups[0]
    columns, stop = {}, 0
    for name, side in first.projections.items():
        columns[name] = slice(stop, stop + side.B.shape[1])
        stop = columns[name].stop
    num_rows = sum(len(side.B) for side in first.projections.values())
    B = first.A.new_zeros(len(groups), num_rows, stop)
    for entry, group in zip(B, groups, strict=True):
        row = 0
        for name, side in group.projections.items():
            entry[row : row + len(side.B), columns[name]] = side.B
            row += len(side.B)
    scales = {
        name: _stack_scales(group.projections[name].row_scale for group in groups)
        for name in columns
    }
    maps = any(side.between is not None for side in first.projections.values())
    return StackedInput(
        A=torch.stack([group.A.T for group in groups]),
        B=B,
        columns=columns,
        row_scales={name: scale for name, scale in scales.items() if scale is not None},
        sources=tuple(groups) if maps else (),
    )


def stack_low_rank_ffn(parts: Sequence[FfnWeights]) -> StackedLowRankFfn:
    """Put the FFN weights of like adapters side by side, E = 1."""
    return StackedLowRankFfn(**_stack_sides(parts))


def stack_expert_ffn(
    parts: Sequence[FfnWeights],
    routers: Sequence[Tensor],
    route: Route,
    unweighted_bias: Tensor | None = None,
) -> StackedExpertFfn:
    """Put the FFN weights of like mixtures side by side.

    Args:
        parts: Each mixture's weights.
        routers: Each mixture's router, [E, D].
        route: Of all of them.
        unweighted_bias: See StackedExpertFfn.
    """
    first = parts[0]
    some = first.sides[0].B  # for its dtype and device
    experts = torch.eye(first.num_experts, dtype=some.dtype, device=some.device)
    return StackedExpertFfn(
        **_stack_sides(parts),
        router=torch.stack([router.T for router in routers]),
        expert_columns=experts.repeat_interleave(first.rank, dim=1),
        route=route,
        apart=first.apart,
        unweighted_bias=unweighted_bias,
    )


def _stack_sides(parts: Sequence[FfnWeights]) -> dict[str, Any]:
    return {
        "input_A": _stack_transposed([part.input_A for part in parts]),
        "gate": _stack_up([part.gate for part in parts]),
        "up": _stack_up([part.up for part in parts]),
        "down_A": _stack_transposed([part.down_A for part in parts]),
        "down": _stack_up([part.down for part in parts]),
    }


def _present(values: Iterable[_Value | None]) -> list[_Value]:
    """Leave out None; like adapters have a part all of them, or none has it."""
    return [value for value in values if value is not None]


def _stack_transposed(matrices: Sequence[Tensor | None]) -> Tensor | None:
    present = _present(matrices)
    return torch.stack([matrix.T for matrix in present]) if present else None


def _stack_scales(scales: Iterable[Tensor | None]) -> Tensor | None:
    """Put DoRA's factors of all adapters' experts one below the other, [N, E, O]."""
    present = _present(scales)
    return torch.stack(present) if present else None


def _stack_up(parts: Sequence[UpProjection | None]) -> StackedSide | None:
    sides = _present(parts)
    if not sides:
        return None
    return StackedSide(
        columns=sides[0].columns,
        B=torch.stack([side.B for side in sides]),
        row_scale=_stack_scales(side.row_scale for side in sides),
        bias=sides[0].bias,
        between=tuple(_present(side.between for side in sides)),
    )
