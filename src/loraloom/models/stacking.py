"""Forwards of a few tokens without gradients: like adapters' rows are computed together.

Axes: B batch, L sequence, T token rows (B·L), N adapters of a cohort, n token rows of each.

Every product of a cohort is one batched product over its N adapters. A cohort's rows are gathered
as [N, n, ...], shorter adapters padded with a row that is thrown away. Rows that no cohort has are
the base's; nothing of a cohort is ever added to them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.base import SegmentTokens
from loraloom.adapters.method import Adapter
from loraloom.models.autocast import outside_autocast
from loraloom.models.stacks import ScaledAdapter, StackPart
from loraloom.ops.expert_ffn import Activation
from loraloom.ops.low_rank import decompose
from loraloom.ops.stacked import StackedInput
from loraloom.routing.record import LayerRouting

MAX_HIDDEN_BYTES = 1 << 20
"""Most bytes of all slots' hidden states; above it, blocks of tokens that stay in the processor's
cache are faster (see ops/lean_expert_ffn.py)."""

Recorder = Callable[[Adapter], Callable[[LayerRouting], None] | None]
"""From an adapter to what takes its routing; None where nobody asks."""
TakeStack = Callable[[tuple[ScaledAdapter, ...], torch.dtype], StackPart]


@dataclass(frozen=True)
class Cohort:
    """Like adapters of a batch and where their rows are.

    Args:
        stack: Of N adapters.
        counts: Token rows of each; the first and the last have some.
        take: Token row of each place of [N, n], flat; None when the cohort has all rows in order.
        put: Place of each token row, any at rows that are not the cohort's; None as above.
        others: True at rows that are not the cohort's, [T, 1]; None where there are none.
    """

    stack: StackPart
    counts: tuple[int, ...]
    take: Tensor | None
    put: Tensor | None
    others: Tensor | None

    @property
    def adapters(self) -> tuple[ScaledAdapter, ...]:
        """N of them."""
        return self.stack.adapters

    @property
    def width(self) -> int:
        """Token rows of each adapter, padding included: n."""
        return max(self.counts)

    def tokens(self, layer: int, index: int, recorder: Recorder, device: Any) -> SegmentTokens:
        """Describe an adapter's rows in a layer; padding at their end is not real."""
        count = self.counts[index]
        record = recorder(self.adapters[index][0]) if count else None
        if count == self.width or record is None:
            return SegmentTokens(layer, record=record)
        real_index = torch.arange(count, device=device)
        return SegmentTokens(layer, None, real_index, None, record)

    @property
    def size(self) -> int:
        """Token rows of all adapters, padding included: N·n."""
        return len(self.adapters) * self.width

    def gather(self, rows: Tensor) -> Tensor:
        """Go from [T, ...] to [N, n, ...]."""
        if self.take is not None:
            rows = rows.index_select(0, self.take)
        return self.side_by_side(rows)

    def side_by_side(self, rows: Tensor) -> Tensor:
        """See gathered rows, [N·n, ...], as [N, n, ...]."""
        return rows.view(len(self.adapters), -1, rows.shape[-1])

    def scatter(self, values: Tensor, blank: float = 0.0) -> Tensor:
        """Go from [N, n, O] to [T, O], with `blank` at rows that are not the cohort's."""
        values = values.flatten(0, 1)
        if self.put is None:
            return values
        rows = values.index_select(0, self.put)
        return rows if self.others is None else rows.masked_fill_(self.others, blank)


@dataclass(frozen=True)
class StackedPlan:
    """The cohorts of a batch, and how their FFN rows lie behind one another.

    Args:
        cohorts: Of attention; those that adapt FFN blocks too come first.
        num_in_ffn: How many of them.
        ffn_take: Token row of each place of all cohorts' rows, behind one another, and behind them
            the rows that no cohort's FFN has; None when there is one cohort with all rows in order.
        ffn_put: Place of each token row among these; None as above.
        device: Of the hidden states.
    """

    cohorts: tuple[Cohort, ...]
    num_in_ffn: int
    ffn_take: Tensor | None
    ffn_put: Tensor | None
    device: torch.device


def plan_stacked(
    take_stack: TakeStack,
    rows: Sequence[ScaledAdapter | None],
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> StackedPlan | None:
    """Plan how to compute a small forward without gradients by cohorts."""
    present = dict.fromkeys(adapter for adapter in rows if adapter is not None)
    # By name, so that stacks don't depend on which row comes first; scales of one stay in order.
    adapters = sorted(present, key=lambda one: one[0].name)
    if not adapters or not _is_small(adapters, len(rows) * length, dtype):
        return None
    alike: dict[Hashable, list[ScaledAdapter]] = {}
    for adapter in adapters:
        alike.setdefault(adapter[0].stack_key(), []).append(adapter)
    if None in alike or not all(_adapts_every_ffn_or_none(adapter) for adapter, _ in adapters):
        return None
    stacks = [take_stack(tuple(adapters), dtype) for adapters in alike.values()]
    return _make_plan(stacks, rows, length, device)


def _adapts_every_ffn_or_none(adapter: Adapter) -> bool:
    layers = range(len(adapter.base_layers))
    return len({adapter.adapts_ffn(layer) for layer in layers}) == 1


def _is_small(adapters: Sequence[ScaledAdapter], num_tokens: int, dtype: torch.dtype) -> bool:
    slots = max(adapter.config.experts_per_token or 1 for adapter, _ in adapters)
    layer = adapters[0][0].base_layers[0]
    width = max([layer.hidden_size, *(one.in_features for one in layer.ffn.values())])
    return slots * num_tokens * width * dtype.itemsize <= MAX_HIDDEN_BYTES


def _make_plan(
    stacks: Sequence[StackPart],
    rows: Sequence[ScaledAdapter | None],
    length: int,
    device: torch.device,
) -> StackedPlan:
    ordered = sorted(stacks, key=lambda stack: not stack.adapts_ffn)
    cohorts = tuple(_make_cohort(stack, rows, length, device) for stack in ordered)
    in_ffn = [cohort for cohort in cohorts if cohort.stack.adapts_ffn]
    if in_ffn and in_ffn[0].put is None:
        return StackedPlan(cohorts, 1, None, None, device)
    order: list[int] = []
    place: dict[int, int] = {}
    for cohort in in_ffn:
        parts = _token_rows(cohort.stack, rows, length)
        place |= {row: len(order) + own for row, own in _places(parts).items()}
        order += _padded(parts)
    for row in range(len(rows) * length):
        if row not in place:
            place[row] = len(order)
            order.append(row)
    put = [place[row] for row in range(len(place))]
    return StackedPlan(
        cohorts,
        len(in_ffn),
        torch.tensor(order, device=device),
        torch.tensor(put, device=device),
        device,
    )


def _make_cohort(
    stack: StackPart, rows: Sequence[ScaledAdapter | None], length: int, device: torch.device
) -> Cohort:
    num_tokens = len(rows) * length
    parts = _token_rows(stack, rows, length)
    counts = tuple(map(len, parts))
    if counts == (num_tokens,):
        return Cohort(stack, counts, None, None, None)
    place = _places(parts)
    put = [place.get(row, 0) for row in range(num_tokens)]
    others = None
    if len(place) < num_tokens:
        mask = [[row not in place] for row in range(num_tokens)]
        others = torch.tensor(mask, device=device)
    take = torch.tensor(_padded(parts), device=device)
    return Cohort(stack, counts, take, torch.tensor(put, device=device), others)


def _token_rows(
    stack: StackPart, rows: Sequence[ScaledAdapter | None], length: int
) -> list[list[int]]:
    """List the token rows of each adapter."""
    return [
        [
            row * length + place
            for row, owner in enumerate(rows)
            if owner == adapter
            for place in range(length)
        ]
        for adapter in stack.adapters
    ]


def _padded(parts: Sequence[list[int]]) -> list[int]:
    """List all adapters' token rows, each padded to the longest by its first row (or row 0)."""
    width = max(map(len, parts))
    return [row for part in parts for row in part + (part[:1] or [0]) * (width - len(part))]


def _places(parts: Sequence[list[int]]) -> dict[int, int]:
    """Say where each token row is among the padded ones."""
    width = max(map(len, parts))
    return {
        row: index * width + offset
        for index, part in enumerate(parts)
        for offset, row in enumerate(part)
    }


_Update = tuple[StackedInput | None, Tensor]


class StackedForward:
    """A forward whose adapters are computed by cohorts."""

    def __init__(self, plan: StackedPlan, recorder: Recorder):
        self._plan = plan
        self._recorder = recorder
        self._shared: tuple[Tensor, int, tuple[str, ...], Sequence[_Update]] | None = None

    def project(
        self,
        layer: int,
        group: tuple[str, ...],
        name: str,
        hidden_states: Tensor,
        output: Tensor,
        linear: nn.Module,
    ) -> Tensor:
        """Adapt an attention projection's output, [B, L, O], in place where that is possible."""
        rows = output.view(-1, output.shape[-1])
        updates = self._updates(layer, group, hidden_states, output.dtype)
        for cohort, (stack, update) in zip(self._plan.cohorts, updates, strict=True):
            if stack is None or name not in stack.columns:
                continue
            rows = _updated(rows, update[:, stack.columns[name]], cohort, stack, name, linear)
        return rows.view(output.shape)

    def ffn(
        self,
        layer: int,
        hidden_states: Tensor,
        base_inputs: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        act: Activation,
        down: nn.Module,
    ) -> Tensor:
        """Compute an FFN block; see FfnBlock.

        Rows are put in the cohorts' order in front of the base's projections, and back behind them.
        """
        plan = self._plan
        cohorts = plan.cohorts[: plan.num_in_ffn]
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        if plan.ffn_take is not None:
            rows = rows.index_select(0, plan.ffn_take)
        gate, up = base_inputs(rows)
        sizes = [cohort.size for cohort in cohorts]
        sizes += [len(rows) - sum(sizes)] * (len(rows) > sum(sizes))
        parts = [_split(values, sizes) for values in (rows, gate, up)]
        with outside_autocast(gate):
            steps = [
                cohort.stack.ffn(layer).step(
                    *(None if own is None else cohort.side_by_side(own) for own in inputs),
                    act,
                    partial(self._tokens, cohort, layer),
                )
                for cohort, *inputs in zip(cohorts, *parts, strict=False)
            ]
        hidden = [rows for rows, _ in steps]
        if len(sizes) > len(cohorts):
            _, gate, up = (own[-1] for own in parts)
            hidden.append(act(gate) if up is None else act(gate) * up)
        output = down(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        base_outputs = _split(output, [len(part) for part in hidden])
        with outside_autocast(gate):
            outputs = [finish(part) for (_, finish), part in zip(steps, base_outputs, strict=False)]
        outputs += base_outputs[len(steps) :]
        is_in_place = all(map(operator.is_, outputs, base_outputs))
        rows = output if is_in_place else torch.cat(outputs)
        if plan.ffn_put is not None:
            rows = rows.index_select(0, plan.ffn_put)
        return rows.view(*hidden_states.shape[:-1], rows.shape[-1])

    def _tokens(self, cohort: Cohort, layer: int, index: int) -> SegmentTokens:
        return cohort.tokens(layer, index, self._recorder, self._plan.device)

    def _updates(
        self, layer: int, group: tuple[str, ...], hidden_states: Tensor, dtype: torch.dtype
    ) -> Sequence[_Update]:
        """Every cohort's update of projections with one input, [T, ΣO]; kept for the next one."""
        if self._shared is not None:
            known_states, known_layer, known_group, updates = self._shared
            if known_states is hidden_states and known_layer == layer and known_group is group:
                return updates
        rows = hidden_states.view(-1, hidden_states.shape[-1]).to(dtype)
        updates = []
        for cohort in self._plan.cohorts:
            stack = cohort.stack.attention(layer, group)
            update = rows
            if stack is not None:
                tokens = partial(self._tokens, cohort, layer)
                update = cohort.scatter(stack.update(cohort.gather(rows), tokens))
            updates.append((stack, update))
        self._shared = (hidden_states, layer, group, updates)
        return updates


def _updated(
    output: Tensor,
    update: Tensor,
    cohort: Cohort,
    stack: StackedInput,
    name: str,
    linear: nn.Module,
) -> Tensor:
    """Add an update to the base's output, or rebuild the cohort's rows by DoRA's formula."""
    row_scale = stack.row_scales.get(name)
    if row_scale is None:
        return output.add_(update)
    factors = row_scale.expand(-1, cohort.width, -1)
    factors = cohort.scatter(factors, blank=1.0)
    bias: Any = linear.bias
    return decompose(output, update, factors, None if bias is None else bias.to(output.dtype))


def _split(rows: Tensor | None, sizes: Sequence[int]) -> Sequence[Any]:
    """Cut rows into parts; views cost as much as small products do."""
    if rows is None or len(sizes) == 1:
        return [rows] * len(sizes)
    return rows.split(list(sizes))
