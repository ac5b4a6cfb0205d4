"""How the samples of a fused forward lie in rows: one each, or packed side by side.

Rows of all jobs have one length in a forward, so jobs that pack agree on a length of rows: the
shortest of several with which little is padded. (Attention takes the square of a row's length.)

Axes: N labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraloom.adapters.adapter import SampleTokens
from loraloom.data.examples import Example, count_labels
from loraloom.data.packing import first_fit, join_samples
from loraloom.training.step.micro_batch import MicroBatch

_LENGTHS = 16
_LITTLE_PADDING = 0.015

Rows = list[list[int]]
"""A job's rows; a row has the places of its samples among the micro-batch's examples."""


@dataclass(frozen=True)
class RowLayout:
    """The rows of a fused forward.

    Args:
        micro_batches: In their order.
        rows: Of each micro-batch.
    """

    micro_batches: Sequence[MicroBatch]
    rows: Sequence[Rows]

    @property
    def is_packed(self) -> bool:
        """Whether a row has several samples."""
        return any(len(row) > 1 for rows in self.rows for row in rows)

    @property
    def adapters(self) -> list[str]:
        """The adapter of each row."""
        pairs = zip(self.micro_batches, self.rows, strict=True)
        return [batch.adapter.name for batch, rows in pairs for _ in rows]

    @property
    def sample_keys(self) -> list[int]:
        """Each sample's key, row after row."""
        return [batch.sample_keys[place] for batch, row in self._each_row() for place in row]

    @property
    def sample_lengths(self) -> list[list[int]] | None:
        """Tokens of each row's samples; None where a row is a sample."""
        if not self.is_packed:
            return None
        return [[len(sample.input_ids) for sample in samples] for samples in self._samples()]

    @property
    def sample_tokens(self) -> list[list[SampleTokens]]:
        """Each micro-batch's samples in the order of their tokens, row after row."""
        return [
            [
                SampleTokens(len(sample.input_ids), sample.expert_group)
                for row in rows
                for sample in map(batch.examples.__getitem__, row)
            ]
            for batch, rows in zip(self.micro_batches, self.rows, strict=True)
        ]

    def joined(self) -> list[Example]:
        """Return each row as one example."""
        return [join_samples(samples) for samples in self._samples()]

    def split_losses(self, losses: Tensor) -> list[Tensor]:
        """Cut the losses of all labels, in row order, into those of each micro-batch's examples."""
        counts = [count_labels(sample) for samples in self._samples() for sample in samples]
        pieces = iter(losses.split(counts))
        split = []
        for rows in self.rows:
            by_place = {place: next(pieces) for row in rows for place in row}
            split.append(torch.cat([by_place[place] for place in range(len(by_place))]))
        return split

    @cached_property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(sum(len(sample.input_ids) for sample in samples) for samples in self._samples())

    @property
    def computed_tokens(self) -> list[int]:
        """Tokens of each micro-batch's rows, padding included."""
        return [len(rows) * self.length for rows in self.rows]

    def _each_row(self) -> Iterator[tuple[MicroBatch, list[int]]]:
        for batch, rows in zip(self.micro_batches, self.rows, strict=True):
            for row in rows:
                yield batch, row

    def _samples(self) -> list[list[Example]]:
        return [[batch.examples[place] for place in row] for batch, row in self._each_row()]


def lay_out(micro_batches: Sequence[MicroBatch]) -> RowLayout:
    """Put micro-batches into rows, packing those that allow it."""
    layouts = [
        RowLayout(micro_batches, [_rows_of(batch, length) for batch in micro_batches])
        for length in _candidates(micro_batches)
    ]
    real = sum(batch.num_tokens for batch in micro_batches)
    padding = [1 - real / sum(layout.computed_tokens) for layout in layouts]
    little = max(min(padding), _LITTLE_PADDING)
    return next(layout for layout, share in zip(layouts, padding, strict=True) if share <= little)


def _candidates(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """Lengths of rows to try, the shortest first: from the longest sample on."""
    least = max(len(sample.input_ids) for batch in micro_batches for sample in batch.examples)
    most = max([least, *(batch.max_row_length or 0 for batch in micro_batches)])
    step = (most - least) / (_LENGTHS - 1)
    return sorted({round(least + step * place) for place in range(_LENGTHS)})


def _rows_of(batch: MicroBatch, length: int) -> Rows:
    if batch.max_row_length is None:
        return [[place] for place in range(len(batch.examples))]
    lengths = [len(example.input_ids) for example in batch.examples]
    return first_fit(lengths, max(min(length, batch.max_row_length), *lengths))
