"""How the samples of a fused forward lie in rows: one each, or packed side by side.

Rows of all jobs have one length in a forward, so jobs that pack agree on a length of rows: the
shortest of some with which little is padded. (Attention takes the square of a row's length.)

Axes: N labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraloom.data.examples import Example
from loraloom.data.packing import first_fit, join_samples
from loraloom.training.step.micro_batch import MicroBatch
from loraloom.training.step.window import count_labels

_LENGTHS = 16
_LITTLE_PADDING = 0.015

Rows = list[list[int]]
"""A job's rows; a row has the places of its samples among the micro-batch's examples."""


@dataclass(frozen=True)
class RowLayout:
    """The rows of a fused forward.

    Args:
        parts: The micro-batches, in their order.
        rows: Of each.
    """

    parts: Sequence[MicroBatch]
    rows: Sequence[Rows]

    @property
    def is_packed(self) -> bool:
        """Whether a row has several samples."""
        return any(len(row) > 1 for rows in self.rows for row in rows)

    @property
    def adapters(self) -> list[str]:
        """The adapter of each row."""
        pairs = zip(self.parts, self.rows, strict=True)
        return [part.adapter.name for part, rows in pairs for _ in rows]

    @property
    def sample_keys(self) -> list[int]:
        """Each sample's key, row after row."""
        return [part.sample_keys[place] for part, row in self._each_row() for place in row]

    @property
    def sample_lengths(self) -> list[list[int]] | None:
        """Tokens of each row's samples; None where a row is a sample."""
        if not self.is_packed:
            return None
        return [[len(one.input_ids) for one in samples] for samples in self._samples()]

    def joined(self) -> list[Example]:
        """Return each row as one example."""
        return [join_samples(samples) for samples in self._samples()]

    def split_losses(self, losses: Tensor) -> list[Tensor]:
        """Cut the losses of all labels, row after row, into those of each micro-batch's examples.

        Args:
            losses: [N].

        Returns:
            A tensor for each micro-batch, example after example.
        """
        counts = [count_labels(one) for samples in self._samples() for one in samples]
        pieces = iter(losses.split(counts))
        split = []
        for rows in self.rows:
            by_place = {place: next(pieces) for row in rows for place in row}
            split.append(torch.cat([by_place[place] for place in range(len(by_place))]))
        return split

    @cached_property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(sum(len(one.input_ids) for one in samples) for samples in self._samples())

    @property
    def computed_tokens(self) -> list[int]:
        """Tokens of each micro-batch's rows, padding included."""
        return [len(rows) * self.length for rows in self.rows]

    def _each_row(self) -> Iterator[tuple[MicroBatch, list[int]]]:
        for part, rows in zip(self.parts, self.rows, strict=True):
            for row in rows:
                yield part, row

    def _samples(self) -> list[list[Example]]:
        return [[part.examples[place] for place in row] for part, row in self._each_row()]


def lay_out(parts: Sequence[MicroBatch]) -> RowLayout:
    """Put micro-batches into rows, packing those that allow it.

    Args:
        parts: At least one, with at least one example each.
    """
    layouts = [
        RowLayout(parts, [_rows_of(part, length) for part in parts])
        for length in _candidates(parts)
    ]
    real = sum(part.num_tokens for part in parts)
    padding = [1 - real / sum(layout.computed_tokens) for layout in layouts]
    little = max(min(padding), _LITTLE_PADDING)
    return next(one for one, share in zip(layouts, padding, strict=True) if share <= little)


def _candidates(parts: Sequence[MicroBatch]) -> list[int]:
    """Lengths of rows to try, the shortest first: from the longest sample on."""
    least = max(len(one.input_ids) for part in parts for one in part.examples)
    most = max([least, *(part.max_row_length or 0 for part in parts)])
    step = (most - least) / (_LENGTHS - 1)
    return sorted({round(least + step * place) for place in range(_LENGTHS)})


def _rows_of(part: MicroBatch, length: int) -> Rows:
    if part.max_row_length is None:
        return [[place] for place in range(len(part.examples))]
    lengths = [len(example.input_ids) for example in part.examples]
    return first_fit(lengths, max(min(length, part.max_row_length), *lengths))
