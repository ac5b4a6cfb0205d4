"""A job's steps in windows of examples, its share of a fused step, and how shares lie in rows.

Rows of all jobs have one length in a forward: jobs that pack several samples into a row agree on
the shortest of several lengths with little padding, as attention takes the square of the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from loraloom.adapters.contract import Adapter
from loraloom.data.tokens import Example, TrainingExample, count_labels, first_fit
from loraloom.data.training_set import StreamedSet, StreamPosition, TrainingSet, examples_digest
from loraloom.errors import ConfigError
from loraloom.routing.record import RouterName
from loraloom.training.settings import TrainConfig
from loraloom.training.step.objectives import Objective, Reference, StepTotals, count_totals

_LENGTHS = 16
_LITTLE_PADDING = 0.015
# A job's rows; a row has the indices of its samples among the micro-batch's examples.
Rows = list[list[int]]


@dataclass(frozen=True)
class Window:
    """The examples of one step, the longest first, so that a micro-batch has little padding."""

    epoch: int  # of streams always 0, as their sample ids go on from pass to pass
    examples: tuple[TrainingExample, ...]
    micro_batch_size: int

    @staticmethod
    def of(epoch: int, examples: Iterable[TrainingExample], config: TrainConfig) -> Window:
        longest_first = sorted(examples, key=lambda example: -longest_row(example))
        return Window(epoch, tuple(longest_first), config.micro_batch_size)

    @property
    def num_micro_batches(self) -> int:
        return math.ceil(len(self.examples) / self.micro_batch_size)

    @cached_property
    def rows(self) -> list[Example]:
        return rows_of(self.examples)

    @cached_property
    def totals(self) -> StepTotals:
        return count_totals(self.examples)

    @cached_property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    def micro_batch(self, index: int) -> list[Example]:
        start = index * self.micro_batch_size
        return rows_of(self.examples[start : start + self.micro_batch_size])


def rows_of(examples: Iterable[TrainingExample]) -> list[Example]:
    rows: list[Example] = []
    for example in examples:
        rows += example.rows
    return rows


def longest_row(example: TrainingExample) -> int:
    return max(len(row.input_ids) for row in example.rows)


class StepOrder:
    """Windows that are a function of the step alone, so that a job can begin anywhere."""

    def __init__(self, training_set: TrainingSet, config: TrainConfig):
        self.training_set = training_set
        self.config = config
        self.steps_per_epoch = math.ceil(training_set.epoch_length / config.batch_size)
        self.total_steps = config.max_steps or (config.num_epochs or 1) * self.steps_per_epoch
        self._order = lru_cache(maxsize=1)(self._make_order)
        self.window = lru_cache(maxsize=1)(self._make_window)

    def _make_window(self, step: int) -> Window:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        start = step_of_epoch * self.config.batch_size
        indices = self._order(epoch)[start : start + self.config.batch_size]
        examples = [self.training_set.examples[index] for index in indices]
        return Window.of(epoch, examples, self.config)

    def epochs_after(self, step: int) -> float:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        length = self.training_set.epoch_length
        return epoch + min(step_of_epoch * self.config.batch_size, length) / length

    def state_dict(self, step: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Do nothing: the step says it all."""

    def _make_order(self, epoch: int) -> list[int]:
        order = self.training_set.epoch_order(epoch)
        if not self.config.group_by_length:
            return order
        lengths = [longest_row(self.training_set.examples[index]) for index in order]
        generator = torch.Generator().manual_seed(epoch)
        grouped = get_length_grouped_indices(lengths, self.config.batch_size, generator=generator)
        return [order[index] for index in grouped]


class StreamOrder:
    """Windows of streams, one after the other; each has batch_size examples."""

    def __init__(self, training_set: StreamedSet, config: TrainConfig):
        assert config.max_steps is not None, "streams need it"
        self.training_set = training_set
        self.config = config
        self.total_steps = config.max_steps
        # Of the step that was asked for last, and of the one after it.
        self._positions: dict[int, StreamPosition] = {0: training_set.start}
        self.window = lru_cache(maxsize=1)(self._make_window)

    def _make_window(self, step: int) -> Window:
        """Return the examples of a step: the last one that was asked for, or the one after it."""
        position = self._positions[step]
        examples, after = self.training_set.take(position, self.config.batch_size)
        self._positions = {step: position, step + 1: after}
        return Window.of(0, examples, self.config)

    def epochs_after(self, step: int) -> float:
        """Return how often the data was read to its end; parts of a pass can't be known."""
        return float(self._positions[max(step, min(self._positions))].passes)

    def state_dict(self, step: int) -> dict[str, Any]:
        position = self._positions[step]
        return {"position": asdict(position), "block": self._begun_block(position)}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        position = StreamPosition.of(state["position"])
        if state["block"] is not None and state["block"] != self._begun_block(position):
            raise ConfigError(
                "--resume requires the data of the interrupted run, but the stream has changed; "
                "restore the data, or pass --overwrite to start again"
            )
        self._positions = {step: position}
        self.window.cache_clear()

    def _begun_block(self, position: StreamPosition) -> str | None:
        # At the beginning of a block, it may not have been read yet.
        read = self.training_set.block
        return examples_digest(read(position).examples) if position.taken else None


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
    # Clips the adapter's gradient and gives its norm; None unless it is complete with this one.
    clip_gradient: Callable[[], Tensor] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def token_share(self) -> float:
        return self.num_tokens / self.window.num_tokens

    def divided(self) -> list[MicroBatch]:
        """Divide a whole step into its micro-batches."""
        starts = self._starts
        size = self.window.micro_batch_size
        firsts = range(0, len(starts), size)
        return [self._subset(starts[first : first + size]) for first in firsts]

    def halves(self) -> list[MicroBatch]:
        """Cut it in two of about the same size, pairs of answers whole; nothing if it has one."""
        starts = self._starts
        if len(starts) < 2:
            return []
        # The longest come first: of packed examples, every second makes halves of equal size.
        if self.max_row_length is not None:
            return [self._subset(starts[::2]), self._subset(starts[1::2])]
        middle = (len(starts) + 1) // 2
        return [self._subset(starts[:middle]), self._subset(starts[middle:])]

    def share(self, rank: int, num_ranks: int) -> MicroBatch:
        """Return what one of several ranks computes: every so-many-th example."""
        if num_ranks == 1:
            return self
        starts = self._starts[rank::num_ranks]
        if starts:
            return self._subset(starts)
        # A rank that none is left for computes the shortest, so that all make the same forwards.
        return replace(self._subset(self._starts[-1:]), counts=False)

    @property
    def _starts(self) -> range:
        return range(0, len(self.examples), len(self.window.examples[0].rows))

    def _subset(self, starts: Sequence[int]) -> MicroBatch:
        indices = [start + row for start in starts for row in range(self._starts.step)]
        examples = [self.examples[index] for index in indices]
        sample_keys = [self.sample_keys[index] for index in indices]
        return replace(self, examples=examples, sample_keys=sample_keys)


@dataclass(frozen=True)
class MicroBatchLoss:
    """A micro-batch's share of its step: shares add up; routers' weigh by tokens, or are None."""

    loss: float
    aux_loss: float = 0.0  # router losses, with coefficients
    router_entropy: float | None = None
    router_load_cv: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)  # by their names in metrics.jsonl
    computed_tokens: int = 0  # padding included
    tokens_per_expert: dict[RouterName, list[int]] = field(default_factory=dict)
    grad_norm: float = 0.0  # before clipping; 0 until the step's gradient is complete

    def __add__(self, addend: MicroBatchLoss) -> MicroBatchLoss:
        sums = {
            name: add_counts(value, getattr(addend, name)) for name, value in vars(self).items()
        }
        return MicroBatchLoss(**sums)


def add_counts(first: Any, second: Any) -> Any:
    """Add numbers, or those of lists and mappings; what is None or not there adds nothing."""
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, Mapping):
        keys = dict.fromkeys([*first, *second])
        return {key: add_counts(first.get(key), second.get(key)) for key in keys}
    if isinstance(first, Sequence):
        return [a + b for a, b in zip(first, second, strict=True)]
    return first + second


def padding_share(tokens: int, computed_tokens: int) -> float:
    return 1 - tokens / computed_tokens if computed_tokens else 0.0


@dataclass(frozen=True)
class RowLayout:
    """Micro-batches in the rows of a fused forward."""

    micro_batches: Sequence[MicroBatch]
    rows: Sequence[Rows]  # of each micro-batch

    @cached_property
    def flat(self) -> list[tuple[MicroBatch, list[int]]]:
        flat = []
        for batch, rows in zip(self.micro_batches, self.rows, strict=True):
            flat += [(batch, row) for row in rows]
        return flat

    @cached_property
    def samples(self) -> list[list[Example]]:
        return [[batch.examples[index] for index in row] for batch, row in self.flat]

    @property
    def computed_tokens(self) -> list[int]:
        lengths = [sum(len(sample.input_ids) for sample in row) for row in self.samples]
        return [len(rows) * max(lengths) for rows in self.rows]

    def split_losses(self, losses: Tensor) -> list[Tensor]:
        """Cut the losses of all labels, in row order, into those of each micro-batch's examples."""
        counts = [count_labels(sample) for row in self.samples for sample in row]
        pieces = iter(losses.split(counts))
        split = []
        for rows in self.rows:
            by_index = {index: next(pieces) for row in rows for index in row}
            split.append(torch.cat([by_index[index] for index in range(len(by_index))]))
        return split


def lay_out(micro_batches: Sequence[MicroBatch]) -> RowLayout:
    min_length = max(len(row.input_ids) for batch in micro_batches for row in batch.examples)
    max_length = max([min_length, *(batch.max_row_length or 0 for batch in micro_batches)])
    step = (max_length - min_length) / (_LENGTHS - 1)
    lengths = sorted({round(min_length + step * number) for number in range(_LENGTHS)})
    layouts = []
    for length in lengths:
        rows = [_rows_of(batch, length) for batch in micro_batches]
        layouts.append(RowLayout(micro_batches, rows))
    num_tokens = sum(batch.num_tokens for batch in micro_batches)
    padding = [padding_share(num_tokens, sum(layout.computed_tokens)) for layout in layouts]
    tolerated = max(min(padding), _LITTLE_PADDING)
    pairs = zip(layouts, padding, strict=True)
    return next(layout for layout, share in pairs if share <= tolerated)


def _rows_of(batch: MicroBatch, length: int) -> Rows:
    if batch.max_row_length is None:
        return [[index] for index in range(len(batch.examples))]
    lengths = [len(example.input_ids) for example in batch.examples]
    return first_fit(lengths, max(min(length, batch.max_row_length), *lengths))
