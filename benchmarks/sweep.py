"""A sweep trained to its end against the same one with successive halving.

Both are trained one after the other; a run that is interrupted goes on when the same command is
given again. Then the best job of each is measured on the held-out rows that ranked the jobs, and on
the validation split that neither training nor ranking has seen, row by row, so that their
difference has a paired standard error. This is done in float32: in bfloat16 a loss moves in the
third digit with the batch that it is computed in.

    .venv/bin/python benchmarks/sweep.py --data ../shared/data --output sweep.json
"""

from __future__ import annotations

import argparse
import csv
import math
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import loraloom
from loraloom.config.loading import load_run_config
from loraloom.config.run import RunConfig
from loraloom.data.examples import Example
from loraloom.data.sources import load_source
from loraloom.data.training_set import load_training_set
from loraloom.durable import write_json
from loraloom.infer.scoring import label_log_probs
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.run import train

GRID, ASHA = "grid", "asha"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = os.environ.get("LORALOOM_SHARED", "../shared")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sweep.yaml"))
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path(shared) / "data")
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep_benchmark"))
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def runs(arguments: argparse.Namespace) -> dict[str, RunConfig]:
    """The recipe with its early stopping and without."""
    changes = [f"base_model={arguments.base_model}", f"sweep.job.data.path={arguments.data}"]
    return {
        name: load_run_config(
            arguments.recipe, [*changes, f"output_dir={arguments.directory / name}", *own]
        )
        for name, own in ((GRID, ["sweep.early_stopping=null"]), (ASHA, []))
    }


def train_or_resume(run: RunConfig) -> None:
    directory = RunDirectory(run.output_dir)
    if not directory.sweep_picture.exists():  # it is drawn at the end
        progress = Progress(Console(), interval_s=60)
        train(run, resume=directory.snapshots.exists(), progress=progress)


def read_table(run: RunConfig) -> list[dict[str, str]]:
    with RunDirectory(run.output_dir).sweep_table.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(run: RunConfig) -> dict[str, Any]:
    """What a sweep did and found."""
    assert run.sweep is not None
    rows = read_table(run)
    best = next(row for row in rows if row["rank"] == "1")
    return {
        "steps": sum(int(row["steps"]) for row in rows),
        "best": best["name"],
        "parameters": {path: best[path] for path in run.sweep.parameters},
        run.sweep.metric: float(best[run.sweep.metric]),
    }


def measured_rows(run: RunConfig, tokenizer: Any) -> dict[str, list[Example]]:
    """The rows that ranked the jobs, and fresh ones."""
    job = run.trials[0].job
    assert job.data.task is not None, "the recipe learns from one task"
    max_length = job.train.max_length
    held_out = load_training_set(job.data, tokenizer, max_length, job.seed).validation
    fresh = load_source(job.data.sources[0], tokenizer, max_length, "validation")
    pieces = [piece for row in fresh.rows for piece in row.pieces]
    return {
        "held out": [row for example in held_out for row in example.rows],
        "validation split": [Example(one.input_ids, one.labels, 0) for one in pieces],
    }


def difference(host: Host, rows: list[Example], pad_id: int) -> dict[str, float]:
    """Loss of each sweep's best, and their difference with its paired standard error.

    A loss is a mean over tokens, so the error is that of a ratio: of sums over rows.
    """
    losses = {
        name: [-one for one in label_log_probs(host, [(name, row) for row in rows])]
        for name in (GRID, ASHA)
    }
    num_tokens = torch.tensor([len(one) for one in losses[GRID]], dtype=torch.float64)
    sums = {name: torch.stack([one.sum() for one in own]) for name, own in losses.items()}
    total, num_rows = num_tokens.sum(), len(rows)
    gap = (sums[ASHA] - sums[GRID]).sum() / total
    deviations = sums[ASHA] - sums[GRID] - gap * num_tokens
    error = math.sqrt(num_rows / (num_rows - 1) * float(deviations.square().sum())) / float(total)
    return {
        **{name: float(own.sum() / total) for name, own in sums.items()},
        "difference": float(gap),
        "standard error": error,
        "rows": num_rows,
    }


def main() -> None:
    arguments = parse_arguments()
    both = runs(arguments)
    for run in both.values():
        train_or_resume(run)
    report: dict[str, Any] = {name: summary(run) for name, run in both.items()}
    report["share of steps"] = report[ASHA]["steps"] / report[GRID]["steps"]
    model, tokenizer = load_base_model(arguments.base_model, "float32", both[GRID].device)
    host = loraloom.attach(model)
    for name, run in both.items():
        host.load(name, run.output_dir / report[name]["best"])
    pad_id = int(tokenizer.pad_token_id)  # pyright: ignore[reportArgumentType]
    report["losses"] = {
        kind: difference(host, rows, pad_id)
        for kind, rows in measured_rows(both[GRID], tokenizer).items()
    }
    print(report)
    if arguments.output is not None:
        write_json(arguments.output, report)


if __name__ == "__main__":
    main()
