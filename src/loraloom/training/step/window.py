"""Which examples a job learns from in a step, and how they are cut into micro-batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, final

from loraloom.data.examples import Example, TrainingExample, count_labels
from loraloom.data.grouping import group_by_length
from loraloom.data.streaming import StreamedSet, StreamPosition
from loraloom.data.training_set import TrainingSet
from loraloom.errors import ConfigError
from loraloom.training.settings import TrainConfig


@dataclass(frozen=True)
class StepTotals:
    """What a step has in all its micro-batches; losses are divided by it.

    Args:
        num_examples: Examples, or pairs of answers.
        num_labels: Tokens with a loss.
        num_chosen_labels: Those of the first row of each example, a pair's chosen answer.
    """

    num_examples: int
    num_labels: int
    num_chosen_labels: int


@dataclass(frozen=True)
class Window:
    """The examples of one step.

    Args:
        epoch: Counted from 0; for streams always 0, as their sample ids go on from pass to pass.
        examples: Fewer than batch_size at an epoch's end. The longest come first, so that a
            micro-batch has examples of like lengths and little padding.
        micro_batch_size: Examples that go through the model at once.
    """

    epoch: int
    examples: tuple[TrainingExample, ...]
    micro_batch_size: int

    @property
    def num_micro_batches(self) -> int:
        """Forwards that the step takes."""
        return math.ceil(len(self.examples) / self.micro_batch_size)

    @cached_property
    def totals(self) -> StepTotals:
        """What losses are divided by."""
        return count_totals(self.examples)

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens, over all micro-batches."""
        return sum(len(row.input_ids) for example in self.examples for row in example.rows)

    def micro_batch(self, index: int) -> tuple[Example, ...]:
        """Return the rows of one forward; the two of a pair are side by side."""
        start = index * self.micro_batch_size
        examples = self.examples[start : start + self.micro_batch_size]
        return tuple(row for example in examples for row in example.rows)


def count_totals(examples: Sequence[TrainingExample]) -> StepTotals:
    """Count what a step with these examples has."""
    return StepTotals(
        num_examples=len(examples),
        num_labels=sum(count_labels(row) for example in examples for row in example.rows),
        num_chosen_labels=sum(count_labels(example.rows[0]) for example in examples),
    )


def longest_row(example: TrainingExample) -> int:
    """Count the tokens of an example's longest row."""
    return max(len(row.input_ids) for row in example.rows)


class Order(ABC):
    """The windows of a job."""

    @property
    @abstractmethod
    def total_steps(self) -> int:
        """Steps of the whole job, unless it is stopped early."""

    @property
    @abstractmethod
    def max_micro_batch_tokens(self) -> int:
        """Tokens of the longest micro-batch of all, padding included."""

    @abstractmethod
    def window(self, step: int) -> Window:
        """Return the examples of a step, counted from 0."""

    @abstractmethod
    def epochs_after(self, step: int) -> float:
        """Return the passes over the data after so many steps."""

    @abstractmethod
    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what a later process needs for the window of a step, in plain values."""

    @abstractmethod
    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


def make_order(training_set: TrainingSet | StreamedSet, config: TrainConfig) -> Order:
    """Make the windows of a job."""
    if isinstance(training_set, StreamedSet):
        return StreamOrder(training_set, config)
    return StepOrder(training_set, config)


@final
class StepOrder(Order):
    """Windows that are a function of the step alone, so that a job can begin anywhere.

    Each epoch has its own order. An epoch's last window takes what is left.
    """

    def __init__(self, training_set: TrainingSet, config: TrainConfig):
        self.training_set = training_set
        self.config = config
        self._order = lru_cache(maxsize=1)(self._make_order)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which an epoch is seen once."""
        return math.ceil(self.training_set.epoch_length / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole job, unless it is stopped early."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        return (self.config.num_epochs or 1) * self.steps_per_epoch

    @property
    def max_micro_batch_tokens(self) -> int:
        """Tokens of the longest micro-batch of all, padding included.

        Where examples are packed, only what the longest one has is known in advance.
        """
        examples = self.training_set.examples
        if self.config.packing:
            return max(sum(len(row.input_ids) for row in example.rows) for example in examples)
        num_examples = min(self.config.micro_batch_size, self.training_set.epoch_length)
        num_rows = num_examples * len(examples[0].rows)
        return num_rows * max(map(longest_row, examples))

    def window(self, step: int) -> Window:
        """Return the examples of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.config.batch_size
        indices = self._order(epoch)[start : start + self.config.batch_size]
        examples = [self.training_set.examples[index] for index in indices]
        return _make_window(epoch, examples, self.config)

    def epochs_after(self, step: int) -> float:
        """Return the passes over the data, as a fraction, after so many steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        length = self.training_set.epoch_length
        return epoch + min(place * self.config.batch_size, length) / length

    def state_dict(self, step: int) -> dict[str, Any]:
        """Nothing is needed."""
        return {}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Nothing is to be done."""

    def _make_order(self, epoch: int) -> list[int]:
        order = self.training_set.epoch_order(epoch)
        if not self.config.group_by_length:
            return order
        lengths = [longest_row(self.training_set.examples[index]) for index in order]
        return group_by_length(order, lengths, self.config.batch_size)


@final
class StreamOrder(Order):
    """Windows of streams, one after the other; each has batch_size examples."""

    def __init__(self, training_set: StreamedSet, config: TrainConfig):
        self.training_set = training_set
        self.config = config
        self._positions: dict[int, StreamPosition] = {0: training_set.start}
        """Of the step that was asked for last, and of the one after it."""

    @property
    def total_steps(self) -> int:
        """See Order."""
        assert self.config.max_steps is not None, "streams need it"
        return self.config.max_steps

    @property
    def max_micro_batch_tokens(self) -> int:
        """What it may have at most; packed rows, what one example may have."""
        number = 1 if self.config.packing else self.config.micro_batch_size
        return sum(map(sum, self.training_set.longest(number)))

    def window(self, step: int) -> Window:
        """Return the examples of a step: the last one that was asked for, or the one after it."""
        position = self._positions[step]
        examples, after = self.training_set.take(position, self.config.batch_size)
        self._positions = {step: position, step + 1: after}
        return _make_window(0, examples, self.config)

    def epochs_after(self, step: int) -> float:
        """Return how often the data was read to its end; parts of a pass can't be known."""
        return float(self._positions[step].passes)

    def state_dict(self, step: int) -> dict[str, Any]:
        """See Order."""
        position = self._positions[step]
        return {"position": asdict(position), "block": self._begun_block(position)}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        position = StreamPosition.of(state["position"])
        if state["block"] is not None and state["block"] != self._begun_block(position):
            raise ConfigError(
                "--resume needs the data that the run began with, the stream has changed since "
                "where it was read last; put it back, or give --overwrite to begin again"
            )
        self._positions = {step: position}

    def _begun_block(self, position: StreamPosition) -> str | None:
        """Hash of the block that is being learnt; None at its beginning, where it may be unread."""
        return self.training_set.block_digest(position) if position.taken else None


def _make_window(epoch: int, examples: list[TrainingExample], config: TrainConfig) -> Window:
    examples.sort(key=lambda example: -longest_row(example))
    return Window(epoch, tuple(examples), config.micro_batch_size)
