"""Which rows of a batch belong to which adapter, and which of a row's tokens to which sample.

Axes: B batch (rows), L sequence (tokens of a row), T tokens of a segment, N features.

The layout is made once for each forward and outlives the backward pass. Rows of one adapter and
scale form a segment; where a batch comes grouped by them, segments are views, otherwise rows are
gathered by segment and put back.

Packed rows hold several samples side by side. Positions restart at each sample's first token. From
that alone transformers makes the masks of most models: a token sees its own sample. `try_packing`
finds the others, which ignore positions, or keep states that samples would share. What is left at
a row's end is padding, a sample of its own to the attention, so that no token sees nothing.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, islice
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.segment import SampleTokens
from loraloom.adapters.weighted_sum import Weighted, write_sum
from loraloom.errors import AdapterError, DataError, ModelError
from loraloom.host.prepared_weights import ScaledAdapter, cut_rows
from loraloom.ops.dropout import SampleSpan

# Tokens of the samples in each row, from its left.
SampleLengths = Sequence[Sequence[int]]
# A row's adapter: its name, its name and a factor of what it adds, several of these whose updates
# are added up, which is `law:0.7+math:0.3` as a name too, or None, the base model. JSON has lists.
RowAdapter = str | tuple[str, float] | Weighted | list[Any] | None
# A batch's adapters; None: the base model for all rows.
RowAdapters = Sequence[RowAdapter] | None


def check_uses_masks(config: Any) -> None:
    """Raise a ModelError if a base model's attention reads no mask, which keeps samples apart."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"packing requires attention with a mask, attn_implementation sdpa or eager, got "
            f"{config._attn_implementation!r}; choose one of them, or set packing: false and "
            "group_by_length: true"
        )


def packed_rows(sample_lengths: SampleLengths, num_rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return tokens' places in samples or padding, and 1 at tokens of samples, [B, L] each."""
    if len(sample_lengths) != num_rows or any(sum(one) > length for one in sample_lengths):
        raise DataError(
            f"sample_lengths must be of {num_rows} rows with up to {length} tokens each, got "
            f"{[sum(one) for one in sample_lengths]} tokens"
        )
    positions = [
        torch.cat([torch.arange(one) for one in (*lengths, length - sum(lengths))])
        for lengths in sample_lengths
    ]
    filled = torch.tensor([sum(lengths) for lengths in sample_lengths])
    return torch.stack(positions), (torch.arange(length) < filled[:, None]).long()


def name_and_scale(adapter: RowAdapter) -> tuple[str | None, float]:
    """Split a row's adapter; the base model has no name, and the scale 1."""
    match adapter:
        case None | str():
            return adapter, 1.0
        case [str(name), float() | int() as scale] if math.isfinite(scale):
            return name, float(scale)
        case [list() | tuple(), *_] if all(isinstance(one, list | tuple) for one in adapter):
            pairs: Any = [name_and_scale(one) for one in adapter]  # pyright: ignore
            if pairs == [tuple(one) for one in adapter]:  # pyright: ignore[reportArgumentType]
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
    first: dict[Hashable, int] = {}
    places = [first.setdefault(adapter, row) for row, adapter in enumerate(adapters)]
    return sorted(range(len(adapters)), key=lambda row: places[row])


@dataclass(frozen=True)
class Layout:
    """All segments of a batch, in the order of their first rows."""

    segments: tuple[Segment, ...]
    row_order: Tensor | None  # rows grouped by segment; None when they come so
    row_inverse: Tensor | None

    def sample_tokens(self, adapter_name: str) -> list[SampleTokens] | None:
        """Return an adapter's samples in the order of their tokens; None outside training."""
        spans = [s.spans for s in self.segments if s.row and s.row[0].name == adapter_name]
        own = [of_segment for of_segment in spans if of_segment is not None]
        return [SampleTokens(span.num_tokens) for one in own for span in one] if own else None

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Cut [B, L, N] into each segment's tokens, [T, N]."""
        values = self._grouped(values)
        rows = values.reshape(-1, values.shape[-1])
        return cut_rows(rows, [segment.num_tokens for segment in self.segments])

    def split_rows(self, values: Tensor) -> Sequence[Tensor]:
        """Cut [B, ...] into each segment's rows."""
        values = self._grouped(values)
        return values.split([one.num_tokens // one.row_length for one in self.segments])

    def join(self, parts: Sequence[Tensor], shape: torch.Size | None = None) -> Tensor:
        values = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        values = values if shape is None else values.view(shape)
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
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    mask = None if mask is None else mask[:, -length:].cpu().bool()
    if mask is not None and mask.shape[1] != length:
        raise DataError(f"attention_mask must have {length} columns, got {mask.shape[1]}")
    mask = None if mask is None or bool(mask.all()) else mask
    order = _grouped(adapters)
    samples = None
    if sample_keys is not None:
        keys = iter(sample_keys)
        counts = [1] * len(adapters) if sample_lengths is None else map(len, sample_lengths)
        samples = [list(islice(keys, count)) for count in counts]
    segments, start = [], 0
    for adapter, group in groupby(order, adapters.__getitem__):
        rows = list(group)
        tokens = slice(start, start + len(rows) * length)
        real = None if mask is None else mask[rows]
        spans = None
        if samples is not None:
            lengths = sample_lengths and [sample_lengths[row] for row in rows]
            spans = _spans([samples[row] for row in rows], lengths, real, length)
        real = None if real is None or bool(real.all()) else real.flatten()
        index = None if real is None else real.nonzero().squeeze(1).to(device)
        real = None if real is None else real.to(device)
        segments.append(Segment(adapter, tokens, real, index, spans, length))
        start = tokens.stop
    if order == list(range(len(order))):
        return Layout(tuple(segments), None, None)
    row_order = torch.tensor(order, device=device)
    return Layout(tuple(segments), row_order, row_order.argsort())


def _spans(
    keys: Sequence[Sequence[int]], lengths: SampleLengths | None, real: Tensor | None, length: int
) -> tuple[SampleSpan, ...]:
    """Give each sample's key and the places of its tokens in a segment."""
    spans: list[SampleSpan] = []
    for row, row_keys in enumerate(keys):
        offset = row * length
        if lengths is not None:
            stops = list(accumulate(lengths[row], initial=offset))
            spans += map(SampleSpan, row_keys, map(slice, stops, stops[1:]))
        else:
            own = slice(offset, offset + length) if real is None else _positions(real[row], offset)
            spans.append(SampleSpan(row_keys[0], own))
    return tuple(spans)


def _positions(mask: Tensor, offset: int) -> slice | Tensor:
    positions = mask.nonzero().squeeze(1) + offset
    if len(positions) == 0:
        return slice(offset, offset)
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
