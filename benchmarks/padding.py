"""How much of what a step computes is padding, by how examples are put into rows.

Instructions (Alpaca's first 5,000 rows, say) and BoolQ mixed, one epoch of steps; several jobs
differ in their seeds and share each step. Rows are laid out, nothing is computed.

    .venv/bin/python benchmarks/padding.py --data data --instructions alpaca.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraloom import load_base_model
from loraloom.config.data import DataConfig
from loraloom.data.training_set import TrainingSet, load_training_set
from loraloom.training.settings import TrainConfig
from loraloom.training.step.batch import MicroBatch, StepOrder, lay_out, padding_share

CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True},
    "both": {"group_by_length": True, "packing": True},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m", help="whose tokenizer is used")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--instructions", required=True, help="rows as JSON lines, or a hub id")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 4], help="jobs in a step")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, help="steps to lay out; an epoch by default")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    _, tokenizer = load_base_model(arguments.base_model)
    boolq = {"task": "boolq", "scoring": "text", "path": str(arguments.data)}
    data = {"mix": [{"dataset": arguments.instructions, "format": "instruction"}, boolq]}
    sets = load_sets(data, tokenizer, arguments.max_length, max(arguments.jobs))
    sizes = {"batch_size": arguments.batch_size, "max_length": arguments.max_length}
    print("jobs  case               real tokens  computed tokens  padding  mean row")
    for count in arguments.jobs:
        for name, settings in CASES.items():
            found = count_padding(sets[:count], sizes | settings, arguments.max_steps)
            print(
                f"{count:4}  {name:17}  {found.real:11,}  {found.computed:15,}  "
                f"{100 * found.share:5.1f} %  {found.row_length:8.0f}"
            )


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


if __name__ == "__main__":
    main()
