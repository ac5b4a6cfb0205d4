"""How the slots of a mixture's tokens are cut into pieces that go through an FFN block at once.

Axes: T tokens, K top_k, D hidden, F feed-forward, E experts, R rank, S = E·R, G experts of a group,
W = G·R, t rows of a piece, few enough that their hidden states stay in the processor's cache.

A masked piece is a block of tokens in one slot. A mask between all experts' A and B keeps each
token's own: nothing is gathered, nothing waits for the host, and work grows with E·R. A gathered
piece has rows of a group of experts, whatever their slots, which are added back: masks keep a row's
own expert within the group, and work grows with K, not with E.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from loraloom.ops.dropout import apply_keep_mask
from loraloom.ops.expert_ffn import FfnWeights, Routing
from loraloom.ops.low_rank import slot_masks

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
class Piece:
    """Rows that go through an FFN block at once."""

    rows: Any  # their tokens, a slice; [t] where they are gathered
    slots: Any  # theirs, one or [t]
    slot_rows: slice | None  # among the rows of all slots, [K·T, ...]; None: all of its slot
    experts: Tensor  # of each, [t]; -1 for the base's own output
    columns: Any  # a slice, those of their experts among all, S; None without an expert
    rank: int
    slot_mask: Tensor | None = None  # of a masked piece with several experts, [t, S]
    num_slots: int = 1  # K
    has_all_rows: bool = False  # all tokens, in their only slot

    @property
    def owns_rows(self) -> bool:
        """Whether rows are gathered, so that `take` returns a copy, which may be written to."""
        return isinstance(self.rows, Tensor)

    @property
    def group(self) -> int:
        return self.columns.start // (self.columns.stop - self.columns.start)

    @property
    def is_masked(self) -> bool:
        """Whether its rows have different experts."""
        if self.owns_rows:
            return self._expert_rows.stop - self._expert_rows.start > 1
        return self.slot_mask is not None

    def mask(self, dtype: torch.dtype) -> Any:
        """1 at the columns of a row's expert among the piece's, [t, W], where it is masked."""
        if not self.owns_rows:
            return self.slot_mask
        first = self._expert_rows.start
        num_experts = self._expert_rows.stop - first
        return slot_masks((self.experts - first)[:, None], num_experts, self.rank, dtype)[0]

    def take(self, values: Tensor) -> Tensor:
        """Rows of [T, ...]; a view of a masked piece's."""
        return values.index_select(0, self.rows) if self.owns_rows else values[self.rows]

    def add(self, total: Tensor, values: Tensor, weight: Tensor | None = None) -> None:
        """Add to rows of [T, ...], which `Total` made, times a weight, [t, 1]."""
        if self.owns_rows:
            total.index_add_(0, self.rows, values if weight is None else values * weight)
            return
        rows = total[self.rows]
        if self.slots > 0:
            rows.add_(values) if weight is None else rows.addcmul_(values, weight)
        elif weight is None:  # the first slot's values are written, not added
            rows.copy_(values)
        else:
            torch.mul(values, weight, out=rows)

    def drop(self, values: Tensor, keep_slots: Sequence[Tensor | None]) -> Tensor:
        """Zero what each slot's dropout drops."""
        if keep_slots[0] is None:
            return values
        if not self.owns_rows:
            return apply_keep_mask(values, keep_slots[self.slots][self.rows])
        sizes = torch.bincount(self.slots, minlength=len(keep_slots)).tolist()
        by_slot = zip(keep_slots, self.rows.split(sizes), strict=True)
        keep = [mask.index_select(0, rows) for mask, rows in by_slot if mask is not None]
        return apply_keep_mask(values, torch.cat(keep))

    @property
    def _rank_rows(self) -> Any:
        """Rows of rank space: [T, S], all slots' in one, or [K·T, W] where they are gathered."""
        return self.slot_rows if self.owns_rows else self.rows

    def take_rank(self, values: Tensor) -> Tensor:
        """Rank-space rows, with zeros outside of their expert's columns."""
        values = values[self._rank_rows]
        return values if self.owns_rows else self.keep_rank(values)

    def add_rank(self, total: Tensor, values: Tensor) -> None:
        """Add rank-space rows that `keep_rank` kept."""
        total[self._rank_rows].add_(values)

    def keep_rank(self, values: Tensor) -> Tensor:
        """Zero what is outside of a row's expert's columns, in each of [t, C·W]."""
        if not self.is_masked:
            return values
        mask = self.mask(values.dtype)
        if values.shape[1] == mask.shape[1]:
            return values * mask
        return (values.unflatten(1, (-1, mask.shape[1])) * mask.unsqueeze(1)).flatten(1)

    def take_slots(self, values: Tensor) -> Tensor:
        """See the piece's rows of [K·T, ...]."""
        if self.slot_rows is None:
            return values.unflatten(0, (self.num_slots, -1))[self.slots]
        return values[self.slot_rows]

    def of_experts(self, weights: Tensor) -> Tensor:
        """See the rows of [S, N] that belong to the piece's experts."""
        return weights[self.columns]

    def of_rows(self, table: Tensor) -> Tensor:
        """Each row's expert's row of [E + 1, F], whose last belongs to expert -1; one for all."""
        if not self.is_masked:
            return table[self._expert_rows]
        # `table[self.experts]` is much slower on a CPU both ways.
        return embedding(self.experts.remainder(len(table)), table)

    def add_row_scale(self, total: Tensor, values: Tensor) -> None:
        """Add to the rows of [E, N] that belong to the piece's experts."""
        expert_rows = total[self._expert_rows]
        if self.is_masked:
            expert_rows += self.mask(values.dtype)[:, :: self.rank].T @ values
        else:
            expert_rows += values.sum(0, keepdim=True)

    @property
    def _expert_rows(self) -> slice:
        """The piece's experts among all, E."""
        return slice(self.columns.start // self.rank, self.columns.stop // self.rank)


def has_cache(device: torch.device) -> bool:
    """Whether a piece stays in a processor's cache, and nobody waits for a device."""
    return device.type == "cpu"


def group_size(experts: Tensor, num_experts: int, rank: int, dtype: torch.dtype) -> int | None:
    """How many experts a group has; None where masks over all experts do as well."""
    # In 16 bits, groups are as wide as multiplies for the price of one column, and pay where all
    # experts are much wider. In 32 every column costs: groups are as narrow as their rows allow.
    num_slots = experts.numel()
    is_narrow = dtype.itemsize <= 2
    if not has_cache(experts.device) or num_slots < MIN_SORTED_SLOTS:
        return None  # on an accelerator, nothing may wait for the counts
    if num_experts == 1 or (is_narrow and num_experts * rank < 4 * GROUP_COLUMNS):
        return None
    largest = 1
    for size in range(1, num_experts + 1):
        if num_experts % size == 0 and size * rank <= GROUP_COLUMNS:
            largest = size
            if not is_narrow and num_slots * size >= MIN_GROUP_ROWS * num_experts:
                return size
    return largest


def sorted_pieces(
    experts: Tensor, num_experts: int, rank: int, size: int, longest: int
) -> tuple[Tensor, list[Piece]]:
    """Cut slots, [K, T], into rows of groups of `size` experts, `longest` at once; -1 comes first.

    Returned are also the slots, of [K·T], in the order of the pieces.
    """
    flat, num_tokens = experts.flatten(), experts.shape[1]
    groups = flat.div(size, rounding_mode="floor") + 1
    counts = torch.bincount(groups, minlength=num_experts // size + 1).tolist()
    # Stable, so that a group's rows come slot after slot, by which `drop` splits them.
    order = groups.argsort(stable=True)
    group_of_piece, lengths = [], []
    for group, count in enumerate(counts, start=-1):
        for start in range(0, count, longest):
            group_of_piece.append(group)
            lengths.append(min(longest, count - start))
    rows = (order % num_tokens).split(lengths)
    slots = order.div(num_tokens, rounding_mode="floor").split(lengths)
    row_experts = flat[order].split(lengths)
    pieces, start = [], 0
    for number, group in enumerate(group_of_piece):
        slot_rows = slice(start, start + lengths[number])
        columns = slice(group * size * rank, (group + 1) * size * rank) if group >= 0 else None
        piece = Piece(rows[number], slots[number], slot_rows, row_experts[number], columns, rank)
        pieces.append(piece)
        start = slot_rows.stop
    return order, pieces


def masked_pieces(
    experts: Tensor, masks: Tensor | None, num_columns: int, rank: int, longest: int
) -> Iterator[Piece]:
    """Cut slots, [K, T], into blocks of tokens, all slots of a block one after another."""
    num_slots, num_tokens = experts.shape
    # All tokens at once on an accelerator, where one kernel is compiled for any number of them.
    blocks = [slice(None)]
    if has_cache(experts.device):
        starts = range(0, num_tokens, longest)
        blocks = [slice(start, min(start + longest, num_tokens)) for start in starts]
    for rows in blocks:
        for slot in range(num_slots):
            slot_rows = None
            if rows.stop is not None:
                first = slot * num_tokens
                slot_rows = slice(first + rows.start, first + rows.stop)
            yield Piece(
                rows=rows,
                slots=slot,
                slot_rows=slot_rows,
                experts=experts[slot, rows],
                columns=slice(0, num_columns),
                rank=rank,
                slot_mask=None if masks is None else masks[slot, rows],
                num_slots=num_slots,
                has_all_rows=num_slots == 1 and len(blocks) == 1,
            )


def _piece_rows(width: int, dtype: torch.dtype) -> int:
    most_bytes = PIECE_BYTES if dtype.itemsize <= 2 else 4 * PIECE_BYTES
    return max(64, most_bytes // (width * dtype.itemsize) // 32 * 32)


@dataclass(frozen=True)
class Slots:
    """Which expert each slot of a token uses."""

    experts: Tensor  # of each, [K, T]; -1 for the base's own output
    num_experts: int
    rank: int
    routed: bool  # without a router there is one expert for all
    apart: bool  # not added up in front of the base's output projection
    group: int | None = None  # experts of a group that slots are sorted by
    order: Any = None  # of the slots among all pieces, [K·T]; None is slot after slot
    by_group: Sequence[Piece] = ()  # cut once for both passes

    @staticmethod
    def of(weights: FfnWeights, routing: Routing | None, output: Tensor) -> Slots:
        """Decide how the slots of a block are cut; without routing there is one of one expert."""
        num_experts, rank = weights.num_experts, weights.rank
        if routing is None:
            experts = torch.zeros(1, len(output), dtype=torch.long, device=output.device)
        else:
            experts = routing.selected_experts.T.contiguous()
        is_routed = routing is not None
        slots = Slots(experts, num_experts, rank, routed=is_routed, apart=weights.apart)
        size = group_size(experts, num_experts, rank, output.dtype) if is_routed else None
        if size is None:
            return slots
        longest = _piece_rows(weights.width, output.dtype)
        order, pieces = sorted_pieces(experts, num_experts, rank, size, longest)
        return replace(slots, group=size, order=order, by_group=pieces)

    def pieces(self, width: int, dtype: torch.dtype) -> Iterable[Piece]:
        """Cut the slots, if they aren't sorted, into blocks of rows of a width."""
        if self.group is not None:
            return self.by_group
        masks = None
        if self.routed:
            masks = slot_masks(self.experts.T, self.num_experts, self.rank, dtype)
        longest = _piece_rows(width, dtype)
        return masked_pieces(self.experts, masks, self.columns, self.rank, longest)

    def by_place(self, weights: Any) -> Any:
        """Bring slots' weights, [T, K], if any, into the order of the pieces, [K·T, 1]."""
        if weights is None:
            return None
        flat = weights.T.reshape(-1, 1)
        return flat if self.order is None else flat.index_select(0, self.order)

    def by_token(self, weights: Any) -> Any:
        """Bring what `by_place` ordered back, [T, K]."""
        if weights is None:
            return None
        if self.order is not None:
            weights = torch.empty_like(weights).index_copy_(0, self.order, weights)
        return weights.view(self.experts.shape).T

    @property
    def columns(self) -> int:
        """Columns of a projection in rank space: S, or W of a group."""
        return self.rank * (self.num_experts if self.group is None else self.group)

    def new_rank_space(self, like: Tensor) -> Tensor:
        """Room for rank-space rows: [T, S], or [K·T, W] by groups."""
        rows = self.experts.shape[1] if self.group is None else self.experts.numel()
        return like.new_zeros(rows, self.columns)


class Total:
    """A sum over slots, [T, N], of [..., N]; what is not a sum at all isn't copied."""

    def __init__(self, slots: Slots, width: int, like: Tensor):
        self._slots = slots
        self._width = width
        self._like = like
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        if self._value is None:
            shape = (self._slots.experts.shape[1], self._width)
            # masked pieces write their first slot
            create = torch.empty if self._slots.group is None else torch.zeros
            self._value = create(shape, dtype=self._like.dtype, device=self._like.device)
        return self._value

    def add(self, piece: Piece, values: Tensor, weight: Tensor | None = None) -> None:
        """Add a piece's rows, which nobody may write to afterwards, times a weight, [t, 1]."""
        if piece.has_all_rows and weight is None:
            self._value = values
        else:
            piece.add(self.value, values, weight)
