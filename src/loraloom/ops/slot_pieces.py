"""How the slots of a mixture's tokens are cut into pieces that go through an FFN block at once.

Axes: T tokens, K top_k, E experts, R rank, S = E·R, G experts of a group, W = G·R, F feed-forward,
t rows of a piece.

`BlockOfSlot` is a block of tokens in one slot. All experts' weights are used, and a mask between A
and B keeps each token's own: nothing is gathered, nothing waits for the host, and work grows with
E·R. `RowsOfGroup` are the rows of a group of experts, whatever their slots: rows are gathered and
added back, masks keep a row's own expert within the group, and work grows with K, not with E.

A piece is small enough that its hidden states stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraloom.ops.dropout import apply_keep_mask
from loraloom.ops.expert_ffn import FfnWeights, Routing
from loraloom.ops.low_rank import rows_of_experts, slot_masks

# Most bytes of a piece's hidden states in 16 bits, four times as many in float32: products take
# most of the time there, and fewer calls save more than the cache.
PIECE_BYTES = 1 << 21

# Most columns of a group, G·R: in 16 bits, processors multiply so few no faster.
GROUP_COLUMNS = 64

# Rows of a group, in the mean, from which smaller groups cost more calls than they save.
MIN_GROUP_ROWS = 128

# Slots from which gathering them by group pays.
MIN_SORTED_SLOTS = 512


@dataclass(frozen=True)
class BlockOfSlot:
    """A block of tokens in one slot.

    Args:
        slot: j.
        rows: Which tokens.
        num_tokens: T.
        experts: Expert of each row, [t]; -1 for the base's own output.
        mask: 1 at the columns of a row's expert, [t, S]; None when there is but one expert.
        rank: R.
    """

    slot: int
    rows: slice
    num_tokens: int
    experts: Tensor
    mask: Tensor | None
    rank: int
    adapted = True
    copies = False

    def take(self, values: Tensor) -> Tensor:
        """Rows of [T, ...]."""
        return values[self.rows]

    def take_slots(self, values: Tensor) -> Tensor:
        """Rows of [K·T, ...], slot after slot."""
        return values[self._slot_rows()]

    def put_slots(self, total: Tensor, values: Tensor) -> None:
        """Write rows of [K·T, ...]."""
        total[self._slot_rows()] = values

    def add(self, total: Tensor, values: Tensor, weight: Tensor | None = None) -> None:
        """Add to rows of [T, ...] times a weight, [t, 1]; the first slot writes."""
        if self.slot > 0:
            rows = total[self.rows]
            rows.add_(values) if weight is None else rows.addcmul_(values, weight)
        elif weight is None:
            total[self.rows] = values
        else:
            torch.mul(values, weight, out=total[self.rows])

    def slot_weights(self, weights: Tensor) -> Tensor:
        """Each row's weight from [T, K], [t, 1]."""
        return weights[self.rows, self.slot, None]

    def put_slot_weights(self, total: Tensor, values: Tensor) -> None:
        """Write each row's value, [t], into [T, K]."""
        total[self.rows, self.slot] = values

    def of_experts(self, weights: Tensor) -> Tensor:
        """Rows of [..., S, N] that belong to the piece's experts."""
        return weights

    def take_rank(self, values: Tensor) -> Tensor:
        """Rank-space rows of [T, S], with zeros outside of their expert's columns."""
        rows = values[self.rows]
        return rows if self.mask is None else rows * self.mask

    def add_rank(self, total: Tensor, values: Tensor) -> None:
        """Add rank-space rows, kept by `keep_rank`, to [T, S]: slots have different columns."""
        total[self.rows] += values

    def keep_rank(self, values: Tensor) -> Tensor:
        """Zero what is outside of a row's expert's columns."""
        return values if self.mask is None else values * self.mask

    def of_rows(self, table: Tensor) -> Tensor:
        """Each row's expert's row of [E + 1, F], whose last belongs to expert -1; one for all."""
        return table[:1] if self.mask is None else rows_of_experts(table, self.experts)

    def add_row_scale(self, total: Tensor, values: Tensor) -> None:
        """Add the factors' gradients, [t, F], to [E, F]."""
        if self.mask is None:
            total += values.sum(0, keepdim=True)
        else:
            total += self.mask[:, :: self.rank].T @ values

    def drop(self, values: Tensor, keep_slots: Sequence[Tensor | None]) -> Tensor:
        """Zero what a slot's dropout drops."""
        keep = keep_slots[self.slot]
        return values if keep is None else apply_keep_mask(values, keep[self.rows])

    def _slot_rows(self) -> slice:
        first = self.slot * self.num_tokens
        return slice(first + self.rows.start, first + self.rows.stop)


@dataclass(frozen=True)
class RowsOfGroup:
    """Rows of a group of experts, in the order of their slots.

    Args:
        group: Columns of the group's experts; None for rows that get the base's own output.
        rows: Token of each row, [t].
        slot_rows: Their places among slot after slot, [t].
        place: Of the piece among the sorted slots, which is where its rows of [K·T, ...] lie.
        experts: Expert of each row, [t].
        num_tokens: T.
        rank: R.
    """

    group: slice | None
    rows: Tensor
    slot_rows: Tensor
    place: slice
    experts: Tensor
    num_tokens: int
    rank: int
    copies = True

    @property
    def adapted(self) -> bool:
        """Whether the piece has experts."""
        return self.group is not None

    def take(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.rows)

    def take_slots(self, values: Tensor) -> Tensor:
        """Rows of [K·T, ...], which lie side by side: nothing is gathered."""
        return values[self.place]

    def put_slots(self, total: Tensor, values: Tensor) -> None:
        total[self.place] = values

    def add(self, total: Tensor, values: Tensor, weight: Tensor | None = None) -> None:
        """Add to rows of [T, ...] times a weight, [t, 1]."""
        total.index_add_(0, self.rows, values if weight is None else values * weight)

    def slot_weights(self, weights: Tensor) -> Tensor:
        return weights.T.flatten().index_select(0, self.slot_rows).unsqueeze(1)

    def put_slot_weights(self, total: Tensor, values: Tensor) -> None:
        slots = self.slot_rows.div(self.num_tokens, rounding_mode="floor")
        total[self.rows, slots] = values

    def of_experts(self, weights: Tensor) -> Tensor:
        """Rows of [..., S, N] that belong to the group."""
        return weights[..., self.group, :]

    def take_rank(self, values: Tensor) -> Tensor:
        """Rank-space rows of [K·T, W], with zeros outside of their expert's columns."""
        return values[self.place]

    def add_rank(self, total: Tensor, values: Tensor) -> None:
        """Add rank-space rows, kept by `keep_rank`, to [K·T, W]."""
        total[self.place] += values

    def keep_rank(self, values: Tensor) -> Tensor:
        return values if self._has_one_expert else values * self._mask(self.rank, values.dtype)

    def of_rows(self, table: Tensor) -> Tensor:
        return table[self._places] if self._has_one_expert else rows_of_experts(table, self.experts)

    def add_row_scale(self, total: Tensor, values: Tensor) -> None:
        own = total[self._places]
        if self._has_one_expert:
            own += values.sum(0, keepdim=True)
        else:
            own += self._mask(1, values.dtype).T @ values

    @property
    def _places(self) -> slice:
        """The group's experts among all."""
        group: slice = self.group  # pyright: ignore[reportAssignmentType]
        return slice(group.start // self.rank, group.stop // self.rank)

    @property
    def _has_one_expert(self) -> bool:
        return self._places.stop - self._places.start == 1

    def _mask(self, rank: int, dtype: torch.dtype) -> Tensor:
        """1 at the columns of a row's expert within the group, each expert's `rank` wide."""
        places = self._places
        own = (self.experts - places.start).unsqueeze(1)
        return slot_masks(own, places.stop - places.start, rank, dtype)[0]

    def drop(self, values: Tensor, keep_slots: Sequence[Tensor | None]) -> Tensor:
        """Zero what each slot's dropout drops."""
        if keep_slots[0] is None:
            return values
        slots = self.slot_rows.div(self.num_tokens, rounding_mode="floor")
        sizes = torch.bincount(slots, minlength=len(keep_slots)).tolist()
        parts = zip(keep_slots, self.rows.split(sizes), strict=True)
        keep = [mask.index_select(0, rows) for mask, rows in parts if mask is not None]
        return apply_keep_mask(values, torch.cat(keep))


Piece = BlockOfSlot | RowsOfGroup


def group_size(experts: Tensor, num_experts: int, rank: int, dtype: torch.dtype) -> int | None:
    """Return how many experts a group has; None where masks over all experts do as well.

    In 16 bits, groups are as wide as multiplies for the price of one column, and pay where all
    experts are much wider. In 32 and more every column costs, and groups are as narrow as their
    rows allow.

    Args:
        experts: Of each slot, [K, T].
        num_experts: E.
        rank: R.
        dtype: Of the products.
    """
    columns, num_slots = num_experts * rank, experts.numel()
    is_narrow = dtype.itemsize <= 2
    if experts.device.type != "cpu" or num_slots < MIN_SORTED_SLOTS:
        return None  # on an accelerator, nothing may wait for the counts
    if num_experts == 1 or (is_narrow and columns < 4 * GROUP_COLUMNS):
        return None
    sizes = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
    fitting = [size for size in sizes if size * rank <= GROUP_COLUMNS] or [1]
    if is_narrow:
        return fitting[-1]
    return next((s for s in fitting if num_slots * s >= MIN_GROUP_ROWS * num_experts), fitting[-1])


def sorted_pieces(
    experts: Tensor, num_experts: int, size: int, rank: int, gate: Tensor
) -> Iterator[RowsOfGroup]:
    """Cut slots into the rows of each group of experts; expert -1 comes first.

    Args:
        experts: Of each slot, [K, T].
        num_experts: E.
        size: Experts of a group, a divisor of E.
        rank: R.
        gate: [T, F], as large as a slot's hidden states.
    """
    num_tokens = experts.shape[1]
    flat = experts.flatten()
    groups = flat.div(size, rounding_mode="floor") + 1
    num_groups = num_experts // size
    counts = torch.bincount(groups, minlength=num_groups + 1).tolist()
    order = groups.argsort(stable=True)
    longest, start = _piece_rows(gate), 0
    for group, slot_rows in zip(range(-1, num_groups), order.split(counts), strict=True):
        columns = slice(group * size * rank, (group + 1) * size * rank) if group >= 0 else None
        for part in slot_rows.split(longest) if len(slot_rows) else ():
            place = slice(start, start := start + len(part))
            yield RowsOfGroup(columns, part % num_tokens, part, place, flat[part], num_tokens, rank)


def _piece_rows(gate: Tensor) -> int:
    """Most rows of a piece."""
    most_bytes = PIECE_BYTES if gate.element_size() <= 2 else 4 * PIECE_BYTES
    return max(64, most_bytes // (gate.shape[1] * gate.element_size()) // 32 * 32)


def masked_pieces(
    experts: Tensor, masks: Tensor | None, rank: int, gate: Tensor
) -> Iterator[BlockOfSlot]:
    """Cut slots, [K, T], into blocks of tokens, all slots of a block one after another.

    Args:
        experts: Of each slot, [K, T].
        masks: See `slot_masks`, [K, T, S]; None when nothing is routed.
        rank: R.
        gate: [T, F], as large as a slot's hidden states; on an accelerator one block holds all.
    """
    num_slots, num_tokens = experts.shape
    step = num_tokens
    if experts.device.type == "cpu":
        step = _piece_rows(gate)
    for start in range(0, num_tokens, max(step, 1)):
        rows = slice(start, min(start + step, num_tokens))
        for slot in range(num_slots):
            mask = None if masks is None else masks[slot, rows]
            yield BlockOfSlot(slot, rows, num_tokens, experts[slot, rows], mask, rank)


@dataclass(frozen=True)
class Slots:
    """Which expert each slot of a token uses.

    Args:
        experts: Of each slot, [K, T]; -1 for the base's own output; None between the passes.
        num_experts: E.
        rank: R.
        routed: Whether there is a router; without, there is one expert for all.
        apart: Slots are not added up in front of the base's output projection.
        group: Experts of a group that slots are sorted by; None where they are not.
        by_group: The sorted pieces, cut once for both passes.
    """

    experts: Any
    num_experts: int
    rank: int
    routed: bool
    apart: bool
    group: int | None
    by_group: Sequence[RowsOfGroup] = ()

    @staticmethod
    def of(weights: FfnWeights, routing: Routing | None, gate: Tensor) -> Slots:
        """Decide how the slots of a block are cut.

        Args:
            weights: The adapter's.
            routing: Slots of each token; None for a plain LoRA.
            gate: Base output of the gate, [T, F].
        """
        size, by_group = None, ()
        if routing is None:
            experts = torch.zeros(1, len(gate), dtype=torch.long, device=gate.device)
        else:
            experts = routing.selected_experts.T.contiguous()
            size = group_size(experts, weights.num_experts, weights.rank, gate.dtype)
        if size is not None:
            cut = sorted_pieces(experts, weights.num_experts, size, weights.rank, gate)
            by_group = tuple(cut)
        return Slots(
            experts,
            weights.num_experts,
            weights.rank,
            routed=routing is not None,
            apart=weights.apart,
            group=size,
            by_group=by_group,
        )

    def without_experts(self) -> Slots:
        """Return these slots without their tensor, which autograd is to save."""
        return replace(self, experts=None)

    def with_experts(self, experts: Tensor) -> Slots:
        return replace(self, experts=experts)

    def masks(self, dtype: torch.dtype) -> Tensor | None:
        """1 at the columns of each slot's expert, [K, T, S]; None when nothing is routed."""
        if not self.routed:
            return None
        return slot_masks(self.experts.T, self.num_experts, self.rank, dtype)

    def pieces(self, gate: Tensor) -> Iterable[Piece]:
        if self.group is not None:
            return self.by_group
        return masked_pieces(self.experts, self.masks(gate.dtype), self.rank, gate)

    @property
    def columns(self) -> int:
        """Columns of a projection in rank space: S, or W of a group."""
        return self.rank * (self.num_experts if self.group is None else self.group)

    def new_rank_space(self, gate: Tensor) -> Tensor:
        """Room for rank-space rows: [T, S], or [K·T, W] by groups."""
        rows = len(gate) if self.group is None else self.experts.numel()
        return gate.new_zeros(rows, self.columns)

    def new_total(self, like: Tensor) -> Tensor:
        """Room for a sum over slots; masked pieces write their first slot."""
        return torch.empty_like(like) if self.group is None else torch.zeros_like(like)
