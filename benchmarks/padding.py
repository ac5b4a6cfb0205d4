"""How much of what a step computes is padding, by how examples are put into rows.

Alpaca and BoolQ mixed, one epoch of steps; several jobs differ in their seeds and share each step.
Rows are laid out, nothing is computed.

    .venv/bin/python benchmarks/padding.py --base-model smollm2-135m --data data
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom import load_base_model
from loraloom.config.data import DataConfig
from loraloom.config.train import TrainConfig
from loraloom.data.training_set import TrainingSet, load_training_set
from loraloom.training.step.micro_batch import MicroBatch, padding_share
from loraloom.training.step.rows import lay_out
from loraloom.training.step.window import StepOrder

CASES: dict[str, dict[str, bool]] = {
    "plain": {},
    "group_by_length": {"group_by_length": True},
    "packing": {"packing": True},
    "both": {"group_by_length": True, "packing": True},
}


@dataclass(frozen=True)
class Named:
    """Stands for an adapter, of which rows need only the name."""

    name: str


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m", help="whose tokenizer is used")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 4], help="jobs in a step")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, help="steps to lay out; an epoch by default")
    return parser.parse_args()


def load_sets(arguments: argparse.Namespace, count: int) -> list[TrainingSet]:
    """Read the same data for each job's seed."""
    _, tokenizer = load_base_model(arguments.base_model)
    alpaca = {
        "dataset": str(arguments.data / "alpaca_cleaned_5k" / "train.jsonl.gz"),
        "format": "instruction",
    }
    boolq = {"task": "boolq", "scoring": "text", "path": str(arguments.data)}
    config = DataConfig.model_validate({"mix": [alpaca, boolq]})
    return [
        load_training_set(config, tokenizer, arguments.max_length, seed) for seed in range(count)
    ]


def measure(
    sets: Sequence[TrainingSet], train: TrainConfig, num_steps: int | None
) -> tuple[int, int, float]:
    """Return real tokens, computed tokens, and the mean length of rows."""
    orders = [StepOrder(training_set, train) for training_set in sets]
    steps = min(num_steps or orders[0].steps_per_epoch, orders[0].steps_per_epoch)
    real, computed, rows = 0, 0, 0
    for step in range(steps):
        parts = [part_of(order, step, f"job{place}") for place, order in enumerate(orders)]
        layout = lay_out(parts)
        real += sum(part.num_tokens for part in parts)
        computed += sum(layout.computed_tokens)
        rows += sum(map(len, layout.rows))
    return real, computed, computed / rows


def part_of(order: StepOrder, step: int, name: str) -> MicroBatch:
    window = order.window(step)
    examples = window.micro_batch(0)
    longest = order.config.max_length if order.config.packing else None
    missing: Any = None
    adapter: Any = Named(name)
    keys = [0] * len(examples)
    return MicroBatch(adapter, examples, keys, window, missing, max_row_length=longest)


def main() -> None:
    arguments = parse_arguments()
    sets = load_sets(arguments, max(arguments.jobs))
    print("jobs  case               real tokens  computed tokens  padding  mean row")
    for count in arguments.jobs:
        for name, settings in CASES.items():
            train = TrainConfig(
                batch_size=arguments.batch_size,
                max_length=arguments.max_length,
                num_epochs=1,
                **settings,
            )
            real, computed, row = measure(sets[:count], train, arguments.max_steps)
            share = 100 * padding_share(real, computed)
            print(f"{count:4}  {name:17}  {real:11,}  {computed:15,}  {share:5.1f} %  {row:8.0f}")


if __name__ == "__main__":
    main()
