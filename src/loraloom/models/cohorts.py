"""The like adapters of a batch, and how their rows are gathered and go back.

Axes: B batch, L sequence, T token rows (B·L), N adapters of a cohort, n token rows of each.

A cohort's rows are gathered as [N, n, ...], shorter adapters padded with a row that is thrown away.
Rows that no cohort has are the base's; nothing of a cohort is ever added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter, SegmentTokens
from loraloom.models.compute_forms import ScaledAdapter
from loraloom.models.stacks import StackPart
from loraloom.routing.record import LayerRouting

MAX_HIDDEN_BYTES = 1 << 20
"""Most bytes of all slots' hidden states; above it, blocks of tokens that stay in the processor's
cache are faster (see ops/lean_expert_ffn.py)."""

Recorder = Callable[[Adapter], Callable[[LayerRouting], None] | None]
"""From an adapter to what takes its routing; None where nobody asks."""
TakeStack = Callable[[tuple[ScaledAdapter, ...], torch.dtype], "StackPart"]


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
