"""Which examples a job learns from in a step, and how they are cut into micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from loraloom.data.tokens import Example, TrainingExample, count_labels, group_by_length
from loraloom.data.training_set import StreamedSet, StreamPosition, TrainingSet
from loraloom.errors import ConfigError
from loraloom.training.settings import TrainConfig


@dataclass(frozen=True)
class StepTotals:
    """What a step has in all its micro-batches; losses are divided by it.

    Chosen labels are those of the first row of each example: a pair's chosen answer.
    """

    num_examples: int
    num_labels: int
    num_chosen_labels: int


@dataclass(frozen=True)
class Window:
    """The examples of one step.

    The longest examples come first, so that a micro-batch has examples of similar lengths and
    little padding. The epoch of streams is always 0, as their sample ids go on from pass to pass.
    """

    epoch: int
    examples: tuple[TrainingExample, ...]
    micro_batch_size: int

    @property
    def num_micro_batches(self) -> int:
        return math.ceil(len(self.examples) / self.micro_batch_size)

    @cached_property
    def totals(self) -> StepTotals:
        return count_totals(self.examples)

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens, over all micro-batches."""
        return sum(len(row.input_ids) for example in self.examples for row in example.rows)

    def micro_batch(self, index: int) -> tuple[Example, ...]:
        """Return the rows of one forward; the two of a pair are next to each other."""
        start = index * self.micro_batch_size
        examples = self.examples[start : start + self.micro_batch_size]
        return tuple(row for example in examples for row in example.rows)


def count_totals(examples: Sequence[TrainingExample]) -> StepTotals:
    return StepTotals(
        num_examples=len(examples),
        num_labels=sum(count_labels(row) for example in examples for row in example.rows),
        num_chosen_labels=sum(count_labels(example.rows[0]) for example in examples),
    )


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

    @property
    def max_micro_batch_tokens(self) -> int:
        """Tokens of the longest micro-batch with padding; if packed, of the longest example."""
        examples = self.training_set.examples
        # How many rows packed examples need is not known in advance.
        if self.config.packing:
            return max(sum(len(row.input_ids) for row in example.rows) for example in examples)
        num_examples = min(self.config.micro_batch_size, self.training_set.epoch_length)
        return num_examples * len(examples[0].rows) * max(map(longest_row, examples))

    def window(self, step: int) -> Window:
        """Return the examples of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.config.batch_size
        indices = self._order(epoch)[start : start + self.config.batch_size]
        return _make_window(epoch, [self.training_set.examples[i] for i in indices], self.config)

    def epochs_after(self, step: int) -> float:
        """Return the passes over the data, as a fraction, after so many steps."""
        epoch, place = divmod(step, self.steps_per_epoch)
        length = self.training_set.epoch_length
        return epoch + min(place * self.config.batch_size, length) / length

    def state_dict(self, step: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Do nothing: the step says it all."""

    def _make_order(self, epoch: int) -> list[int]:
        order = self.training_set.epoch_order(epoch)
        if not self.config.group_by_length:
            return order
        lengths = [longest_row(self.training_set.examples[index]) for index in order]
        return group_by_length(order, lengths, self.config.batch_size)


class StreamOrder:
    """Windows of streams, one after the other; each has batch_size examples."""

    def __init__(self, training_set: StreamedSet, config: TrainConfig):
        assert config.max_steps is not None, "streams need it"
        self.training_set = training_set
        self.config = config
        self.total_steps = config.max_steps
        # Of the step that was asked for last, and of the one after it.
        self._positions: dict[int, StreamPosition] = {0: training_set.start}

    @property
    def max_micro_batch_tokens(self) -> int:
        """What the longest micro-batch may have; if packed, what one example may have."""
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
        position = self._positions[step]
        return {"position": asdict(position), "block": self._begun_block(position)}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        position = StreamPosition.of(state["position"])
        if state["block"] is not None and state["block"] != self._begun_block(position):
            raise ConfigError(
                "--resume needs the data that the run began with, the stream has changed since "
                "where it was read last; put it back, or give --overwrite to begin again"
            )
        self._positions = {step: position}

    def _begun_block(self, position: StreamPosition) -> str | None:
        # At the beginning of a block, it may not have been read yet.
        return self.training_set.block_digest(position) if position.taken else None


def _make_window(epoch: int, examples: list[TrainingExample], config: TrainConfig) -> Window:
    examples.sort(key=lambda example: -longest_row(example))
    return Window(epoch, tuple(examples), config.micro_batch_size)
