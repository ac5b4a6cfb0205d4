"""How much of what steps compute is padding: rows are laid out, nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import DataConfig
from loraloom.config.train import TrainConfig
from loraloom.data.training_set import TrainingSet, load_training_set
from loraloom.training.step.micro_batch import MicroBatch, padding_share
from loraloom.training.step.rows import lay_out
from loraloom.training.step.window import StepOrder


@dataclass(frozen=True)
class _Named:
    """Stands for an adapter, of which rows need only the name."""

    name: str


@dataclass(frozen=True)
class PaddingFigures:
    """Real tokens of steps, those that are computed, and the mean length of rows."""

    real: int
    computed: int
    row_length: float

    @property
    def share(self) -> float:
        """Of what is computed, how much is padding."""
        return padding_share(self.real, self.computed)


def load_sets(
    data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, count: int
) -> list[TrainingSet]:
    """Read the same data, as under `data:` in a run file, for each of so many jobs' seeds."""
    config = DataConfig.model_validate(data)
    return [load_training_set(config, tokenizer, max_length, seed) for seed in range(count)]


def count_padding(
    sets: Sequence[TrainingSet], train: Mapping[str, Any], num_steps: int | None = None
) -> PaddingFigures:
    """Lay out the steps of jobs, one for each training set."""
    config = TrainConfig.model_validate({**train, "num_epochs": 1})
    orders = [StepOrder(training_set, config) for training_set in sets]
    steps = min(num_steps or orders[0].steps_per_epoch, orders[0].steps_per_epoch)
    real, computed, rows = 0, 0, 0
    for step in range(steps):
        parts = [_part_of(order, step, f"job{place}") for place, order in enumerate(orders)]
        layout = lay_out(parts)
        real += sum(part.num_tokens for part in parts)
        computed += sum(layout.computed_tokens)
        rows += sum(map(len, layout.rows))
    return PaddingFigures(real, computed, computed / rows)


def _part_of(order: StepOrder, step: int, name: str) -> MicroBatch:
    window = order.window(step)
    examples = window.micro_batch(0)
    longest = order.config.max_length if order.config.packing else None
    missing: Any = None
    adapter: Any = _Named(name)
    keys = [0] * len(examples)
    return MicroBatch(adapter, examples, keys, window, missing, max_row_length=longest)
