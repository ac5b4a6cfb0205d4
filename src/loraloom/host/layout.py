"""Which rows of a batch belong to which adapter, and which of a row's tokens to which sample.

Axes: B batch (rows), L sequence (tokens of a row), T tokens of a segment, N features.

The layout is made once for each forward and outlives the backward pass. Rows of one adapter and
scale form a segment; where a batch comes grouped by them, segments are views, otherwise rows are
gathered by segment and put back.

Packed rows hold several samples side by side. Positions restart at each sample's first token. From
that alone transformers makes the masks of most models: a token sees its own sample. `_try_packing`
finds the others, which ignore positions, or keep states that samples would share. What is left at
a row's end is padding, a sample of its own to the attention, so that no token sees nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, islice, pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.segment import SampleTokens
from loraloom.adapters.weighted_sum import Weighted, write_sum
from loraloom.errors import AdapterError, DataError
from loraloom.host.prepared_weights import ScaledAdapter
from loraloom.host.stacked_forward import cut_rows
from loraloom.ops.dropout import SampleSpan

# Tokens of the samples in each row, from its left.
SampleLengths = Sequence[Sequence[int]]
# A row's adapter: its name, its name and a factor of what it adds, several of these whose updates
# are added up, which is `law:0.7+math:0.3` as a name too, or None, the base model. JSON has lists.
RowAdapter = str | tuple[str, float] | Weighted | list[Any] | None
# A batch's adapters; None: the base model for all rows.
RowAdapters = Sequence[RowAdapter] | None


def packed_rows(sample_lengths: SampleLengths, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens' places in samples or padding, and 1 at tokens of samples, [B, L] each."""
    num_tokens = [sum(lengths) for lengths in sample_lengths]
    if len(num_tokens) != num_rows or any(count > length for count in num_tokens):
        raise DataError(
            f"sample_lengths must be of {num_rows} rows with up to {length} tokens each, got "
            f"{num_tokens} tokens"
        )
    positions = []
    for lengths, count in zip(sample_lengths, num_tokens, strict=True):
        spans = [torch.arange(span) for span in (*lengths, length - count)]
        positions.append(torch.cat(spans))
    is_filled = torch.arange(length) < torch.tensor(num_tokens)[:, None]
    return torch.stack(positions), is_filled.long()


def is_padded_at_ends(mask: Tensor | None) -> bool:
    """Whether a mask, [B, L], has padding behind rows' tokens alone; False for one on a device."""
    if mask is None or mask.dim() != 2 or mask.device.type != "cpu":  # no device is waited for
        return False
    return bool((mask[:, :-1] >= mask[:, 1:]).all())


def name_and_scale(adapter: RowAdapter) -> tuple[str | None, float]:
    """Split a row's adapter; the base model has no name, and the scale 1."""
    match adapter:
        case None | str():
            return adapter, 1.0
        case [str(name), float() | int() as scale] if math.isfinite(scale):
            return name, float(scale)
        case [list() | tuple(), *_] if all(isinstance(term, list | tuple) for term in adapter):
            pairs: Any = [name_and_scale(term) for term in adapter]
            if pairs == [tuple(term) for term in adapter]:
                return write_sum(pairs), 1.0
    raise AdapterError(
        "a row's adapter must be a name, (name, scale) with a finite scale, a sum as "
        f"'law:0.7+math:0.3', or None, got {adapter!r}"
    )


@dataclass(frozen=True)
class Segment:
    """The rows of one adapter, or of the base model, and scale."""

    row: ScaledAdapter | None
    tokens: slice  # in the token rows grouped by segment
    real: Tensor | None  # True at real tokens, [T]; None when all are
    real_index: Tensor | None  # their positions
    spans: tuple[SampleSpan, ...] | None  # samples for random numbers, in training
    row_length: int

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start

    def behind_cache(self, length: int, device: torch.device) -> Segment:
        """Describe the rows with tokens of a cache in front, `length` tokens each in all.

        Records and random numbers remain those of the forward's tokens.
        """

        def move(positions: Tensor) -> Tensor:
            rows = positions // self.row_length
            return positions + (rows + 1) * (length - self.row_length)

        real_index = self.real_index
        if real_index is None:
            real_index = torch.arange(self.num_tokens, device=device)
        spans = None
        if self.spans is not None:
            places = torch.arange(self.num_tokens)
            spans = tuple(SampleSpan(s.key, move(places[s.tokens])) for s in self.spans)
        start = self.tokens.start // self.row_length * length
        stop = self.tokens.stop // self.row_length * length
        return Segment(
            row=self.row,
            tokens=slice(start, stop),
            real=None,
            real_index=move(real_index),
            spans=spans,
            row_length=length,
        )


def rows_in_record(adapters: Sequence[RowAdapter]) -> dict[str, list[int]]:
    """List the rows that an adapter's record is of, in the record's order."""
    scaled = [name_and_scale(adapter) for adapter in adapters]
    rows: dict[str, list[int]] = {}
    for row in _grouped(scaled):
        name, _ = scaled[row]
        if name is not None:
            rows.setdefault(name, []).append(row)
    return rows


def _grouped(adapters: Sequence[Hashable]) -> list[int]:
    """List rows by adapter, in the order of the adapters' first rows."""
    first_rows: dict[Hashable, int] = {}
    for row, adapter in enumerate(adapters):
        first_rows.setdefault(adapter, row)
    return sorted(range(len(adapters)), key=lambda row: first_rows[adapters[row]])


@dataclass(frozen=True)
class Layout:
    """All segments of a batch, in the order of their first rows."""

    segments: tuple[Segment, ...]
    row_order: Tensor | None  # rows grouped by segment; None when they come so
    row_inverse: Tensor | None

    @property
    def has_padding(self) -> bool:
        return any(segment.real is not None for segment in self.segments)

    def sample_tokens(self, adapter_name: str) -> list[SampleTokens] | None:
        """Return an adapter's samples in the order of their tokens; None outside training."""
        samples = []
        for segment in self.segments:
            if segment.row and segment.row[0].name == adapter_name and segment.spans is not None:
                samples += [SampleTokens(span.num_tokens) for span in segment.spans]
        return samples or None

    def of_input(self, values: Tensor) -> Layout:
        """Return the layout of a projection's input, [B, ..., N].

        Latent attention projects all tokens of its cache in each step.
        """
        first = self.segments[0]
        num_rows = self.segments[-1].tokens.stop // first.row_length
        length = values.numel() // values.shape[-1] // num_rows
        if length == first.row_length:
            return self
        segments = [segment.behind_cache(length, values.device) for segment in self.segments]
        return replace(self, segments=tuple(segments))

    def by_row(self, values: Tensor) -> Tensor:
        """See [B, L, N] or tokens one behind another, [B·L, N], as [B, L, N]."""
        return values.view(-1, self.segments[0].row_length, values.shape[-1])

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Cut [B, L, N] into each segment's tokens, [T, N]."""
        values = self._grouped(values)
        rows = values.reshape(-1, values.shape[-1])
        return cut_rows(rows, [segment.num_tokens for segment in self.segments])

    def split_rows(self, values: Tensor) -> Sequence[Tensor]:
        """Cut [B, ...] into each segment's rows."""
        values = self._grouped(values)
        return values.split([segment.num_tokens // segment.row_length for segment in self.segments])

    def join(self, by_segment: Sequence[Tensor], shape: torch.Size | None = None) -> Tensor:
        """Undo `split`, to a shape, or `split_rows`."""
        values = by_segment[0] if len(by_segment) == 1 else torch.cat(list(by_segment))
        if shape is not None:
            values = values.view(shape)
        return values if self.row_inverse is None else values.index_select(0, self.row_inverse)

    def _grouped(self, values: Tensor) -> Tensor:
        return values if self.row_order is None else values.index_select(0, self.row_order)


def make_layout(
    adapters: Sequence[ScaledAdapter | None],
    length: int,
    mask: Tensor | None,
    sample_keys: Sequence[int] | None,
    device: torch.device,
    sample_lengths: SampleLengths | None = None,
) -> Layout:
    """Lay rows out; of a padding mask, [B, …], the last columns are this forward's tokens."""
    mask = _padding_mask(mask, length)
    keys_by_row = None
    if sample_keys is not None:
        keys = iter(sample_keys)
        counts = [1] * len(adapters) if sample_lengths is None else map(len, sample_lengths)
        keys_by_row = [list(islice(keys, count)) for count in counts]
    order = _grouped(adapters)
    groups = [list(rows) for _, rows in groupby(order, adapters.__getitem__)]
    padding = repeat((None, None)) if mask is None else _real_tokens(mask, groups, device)
    segments: list[Segment] = []
    start = 0
    for rows, (real, real_index) in zip(groups, padding, strict=False):
        tokens = slice(start, start + len(rows) * length)
        spans = None
        if keys_by_row is not None:
            spans = _spans(rows, keys_by_row, sample_lengths, mask, length)
        segment = Segment(
            row=adapters[rows[0]],
            tokens=tokens,
            real=real,
            real_index=real_index,
            spans=spans,
            row_length=length,
        )
        segments.append(segment)
        start = tokens.stop
    if order == list(range(len(order))):
        return Layout(tuple(segments), row_order=None, row_inverse=None)
    row_order = torch.tensor(order, device=device)
    return Layout(tuple(segments), row_order, row_inverse=row_order.argsort())


def _real_tokens(
    mask: Tensor, groups: Sequence[list[int]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor] | tuple[None, None]]:
    """Yield, for each group of rows, which tokens are real, and their positions; None: all."""
    real = [mask[rows].flatten() for rows in groups]
    indices = [is_real.nonzero().squeeze(1) for is_real in real]
    # At once, as each copy waits for the device.
    by_group = torch.cat(real).to(device).split([len(is_real) for is_real in real])
    indices = torch.cat(indices).to(device).split([len(index) for index in indices])
    for is_real, index in zip(by_group, indices, strict=True):
        yield (is_real, index) if len(index) < len(is_real) else (None, None)


def _padding_mask(mask: Any, length: int) -> Tensor | None:
    """Return which tokens are real, [B, L], on the CPU; None where all are."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    is_real = mask[:, -length:].cpu().bool()
    if is_real.shape[1] != length:
        raise DataError(f"attention_mask must have {length} columns, got {is_real.shape[1]}")
    return None if bool(is_real.all()) else is_real


def _spans(
    rows: Sequence[int],
    keys_by_row: Sequence[Sequence[int]],
    sample_lengths: SampleLengths | None,
    mask: Tensor | None,
    length: int,
) -> tuple[SampleSpan, ...]:
    """Give each sample's key and the places of its tokens in a segment of rows."""
    spans: list[SampleSpan] = []
    for number, row in enumerate(rows):
        offset = number * length
        if sample_lengths is not None:
            starts = accumulate(sample_lengths[row], initial=offset)
            tokens = [slice(start, stop) for start, stop in pairwise(starts)]
        elif mask is not None:
            tokens = [_positions(mask[row], offset)]
        else:
            tokens = [slice(offset, offset + length)]
        spans += map(SampleSpan, keys_by_row[row], tokens)
    return tuple(spans)


def _positions(mask: Tensor, offset: int) -> slice | Tensor:
    positions = mask.nonzero().squeeze(1) + offset
    if len(positions) == 0:
        return slice(offset, offset)
    first = int(positions[0])
    last = int(positions[-1])
    has_no_gap = last - first + 1 == len(positions)
    return slice(first, last + 1) if has_no_gap else positions
