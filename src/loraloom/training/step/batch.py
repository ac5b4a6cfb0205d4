"""A job's share of a fused step, what comes of it, and how the shares of all jobs lie in rows.

Rows of all jobs have one length in a forward. A row is one sample, or several packed side by side:
jobs that pack agree on the shortest of several lengths with which little is padded, as attention
takes the square of a row's length.

Axes: N labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from loraloom.adapters.method import Adapter
from loraloom.data.tokens import Example, count_labels, first_fit
from loraloom.routing.record import RouterName
from loraloom.routing.tally import Choices
from loraloom.training.step.objectives import Objective, Reference
from loraloom.training.step.window import Window

_LENGTHS = 16
_LITTLE_PADDING = 0.015

# A job's rows; a row has the places of its samples among the micro-batch's examples.
Rows = list[list[int]]


@dataclass(frozen=True)
class MicroBatch:
    """What a job puts into the next forward."""

    adapter: Adapter
    examples: Sequence[Example]  # the chosen and the rejected answer of a pair in turn
    sample_keys: Sequence[int]  # for dropout and jitter
    window: Window  # the step that they belong to
    objective: Objective
    reference: Reference | None = None
    max_row_length: int | None = None  # of a row that samples share; None: each has a row
    counts: bool = True  # False for a rank that no example is left for
    loss_scale: float = 1.0  # factor of the loss in the backward pass alone
    is_last: bool = False  # the step's gradient is complete with it

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def token_share(self) -> float:
        """Its part of the step's real tokens."""
        return self.num_tokens / self.window.num_tokens

    def halves(self) -> list[MicroBatch]:
        """Cut it in two of about the same size, pairs of answers whole; nothing if it has one."""
        starts = self._starts
        if len(starts) < 2:
            return []
        middle = (len(starts) + 1) // 2
        cut = (starts[:middle], starts[middle:])
        # The longest come first: of packed examples, every other one makes halves of equal size.
        if self.max_row_length is not None:
            cut = (starts[::2], starts[1::2])
        return [self._subset(half) for half in cut]

    def share(self, rank: int, num_ranks: int) -> MicroBatch:
        """Return what one of several ranks computes: every so-many-th example."""
        if num_ranks == 1:
            return self
        own = self._starts[rank::num_ranks]
        # A rank that none is left for computes the shortest, so that all make the same forwards.
        return self._subset(own) if own else replace(self._subset(self._starts[-1:]), counts=False)

    @property
    def _starts(self) -> range:
        """Where each example's rows begin."""
        return range(0, len(self.examples), len(self.window.examples[0].rows))

    def _subset(self, starts: Sequence[int]) -> MicroBatch:
        places = [start + row for start in starts for row in range(self._starts.step)]
        examples = [self.examples[place] for place in places]
        keys = [self.sample_keys[place] for place in places]
        return replace(self, examples=examples, sample_keys=keys)


@dataclass(frozen=True)
class MicroBatchLoss:
    """A micro-batch's share of its step: shares add up to the step's figures.

    What routers give is weighed by its share of the step's real tokens; None without a router.
    """

    loss: float
    aux_loss: float = 0.0  # router losses, with coefficients
    router_entropy: float | None = None
    router_load_cv: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # by their names in metrics.jsonl
    computed_tokens: int = 0  # padding included
    tokens_per_expert: dict[RouterName, list[int]] = field(default_factory=dict)

    def __add__(self, other: MicroBatchLoss) -> MicroBatchLoss:
        return MicroBatchLoss(
            self.loss + other.loss,
            self.aux_loss + other.aux_loss,
            _add(self.router_entropy, other.router_entropy),
            _add(self.router_load_cv, other.router_load_cv),
            {name: self.metrics.get(name, 0.0) + value for name, value in other.metrics.items()},
            self.computed_tokens + other.computed_tokens,
            add_counts(self.tokens_per_expert, other.tokens_per_expert),
        )


def add_counts(first: Choices, second: Choices) -> dict[RouterName, list[int]]:
    """Add how often each router chose each expert; none at all counts as zeros."""
    if not first or not second:
        return {router: list(counts) for router, counts in (first or second).items()}
    return {
        router: [a + b for a, b in zip(counts, second[router], strict=True)]
        for router, counts in first.items()
    }


def _add(left: float | None, right: float | None) -> float | None:
    return right if left is None else left if right is None else left + right


@dataclass(frozen=True)
class StepReport:
    """What a step of a job did.

    `warnings` are new with it. A job without a `loss_scale` skips no steps; `grad_norm` is not
    finite where it did.
    """

    step: int
    epoch: float
    loss: MicroBatchLoss
    learning_rate: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    warnings: tuple[str, ...] = ()
    loss_scale: float | None = None
    skipped_steps: int = 0


def padding_share(tokens: int, computed_tokens: int) -> float:
    """Return the share of computed tokens that are no real ones; 0 before the first."""
    return 1 - tokens / computed_tokens if computed_tokens else 0.0


@dataclass(frozen=True)
class RowLayout:
    """Micro-batches in the rows of a fused forward."""

    micro_batches: Sequence[MicroBatch]
    rows: Sequence[Rows]  # of each micro-batch

    @cached_property
    def flat(self) -> list[tuple[MicroBatch, list[int]]]:
        pairs = zip(self.micro_batches, self.rows, strict=True)
        return [(batch, row) for batch, rows in pairs for row in rows]

    @cached_property
    def samples(self) -> list[list[Example]]:
        return [[batch.examples[place] for place in row] for batch, row in self.flat]

    @property
    def computed_tokens(self) -> list[int]:
        """Tokens of each micro-batch's rows, padding included."""
        length = max(sum(len(sample.input_ids) for sample in row) for row in self.samples)
        return [len(rows) * length for rows in self.rows]

    def split_losses(self, losses: Tensor) -> list[Tensor]:
        """Cut the losses of all labels, in row order, into those of each micro-batch's examples."""
        counts = [count_labels(sample) for row in self.samples for sample in row]
        pieces = iter(losses.split(counts))
        split = []
        for rows in self.rows:
            by_place = {place: next(pieces) for row in rows for place in row}
            split.append(torch.cat([by_place[place] for place in range(len(by_place))]))
        return split


def lay_out(micro_batches: Sequence[MicroBatch]) -> RowLayout:
    """Put micro-batches into rows, packing those that allow it."""
    least = max(len(sample.input_ids) for batch in micro_batches for sample in batch.examples)
    most = max([least, *(batch.max_row_length or 0 for batch in micro_batches)])
    step = (most - least) / (_LENGTHS - 1)
    layouts = [
        RowLayout(micro_batches, [_rows_of(batch, length) for batch in micro_batches])
        for length in sorted({round(least + step * place) for place in range(_LENGTHS)})
    ]
    real = sum(batch.num_tokens for batch in micro_batches)
    padding = [1 - real / sum(layout.computed_tokens) for layout in layouts]
    little = max(min(padding), _LITTLE_PADDING)
    return next(layout for layout, share in zip(layouts, padding, strict=True) if share <= little)


def _rows_of(batch: MicroBatch, length: int) -> Rows:
    if batch.max_row_length is None:
        return [[place] for place in range(len(batch.examples))]
    lengths = [len(example.input_ids) for example in batch.examples]
    return first_fit(lengths, max(min(length, batch.max_row_length), *lengths))
