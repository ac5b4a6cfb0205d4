"""Train on the workers of a local Ray cluster and in one process, and compare.

    python -m benchmarks.cluster [--workers 2] [--steps 60]

A sweep of twelve jobs with successive halving must end with every job in its table and the best one
trained to its end. Then six jobs of four methods, with dropout and jitter, on a tiny base model in
float32: one worker is killed (SIGKILL) on the way. Printed is ‖a - b‖ / ‖b‖ of all weights of each
adapter, and of the tensor where that is largest. It exits with 1 where something is not so.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

import loraloom
from benchmarks.kills import ADAPTERS
from benchmarks.parallel import difference
from loraloom.terminal import make_console
from loraloom.training.job import JobResult
from loraloom.training.reporting import Progress
from loraloom.training.workers import connected
from tests.training.saved import run_settings, save_inputs

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


def six_jobs(inputs: Path, output_dir: Path, steps: int) -> dict[str, Any]:
    """Make a run of six jobs with snapshots every few steps."""
    run = run_settings(inputs, output_dir)
    template = run["jobs"][0]
    adapters = [*ADAPTERS.items(), *list(ADAPTERS.items())[1:3]]
    train = {**template["train"], "max_steps": steps, "eval_steps": 20, "save_steps": 3}
    run["jobs"] = [
        {
            **template,
            "name": f"{name}-{seed}",
            "seed": seed,
            "adapter": {"alpha": 4, **adapter},
            "train": {**train, "learning_rate": 1e-3, "micro_batch_size": (4, 2, 1)[seed % 3]},
        }
        for seed, (name, adapter) in enumerate(adapters)
    ]
    return run


def sweep_of_twelve(inputs: Path, output_dir: Path) -> dict[str, Any]:
    """Make a sweep over rates and ranks, which stops half of the jobs at each rung."""
    run = run_settings(inputs, output_dir)
    plain = run.pop("jobs")[0]
    plain["train"] |= {"max_steps": 20, "micro_batch_size": 2, "eval_steps": None}
    run["sweep"] = {
        "job": plain,
        "parameters": {"train.learning_rate": RATES, "adapter.rank": [2, 4]},
        "early_stopping": {"asha": {"min_steps": 4, "reduction_factor": 2}},
    }
    return run


def train_on(workers: int, run: dict[str, Any]) -> list[JobResult]:
    """Train a run on so many workers, and print what it says on the way."""
    progress = Progress(make_console())
    return loraloom.train(run, ray="auto", ray_workers=workers, progress=progress)


def kill_a_worker(output_dir: Path, killed: list[int]) -> None:
    """Kill one of Ray's workers as soon as some worker has its fourth snapshot."""
    while not any(output_dir.glob(".checkpoints/worker-*/snapshot-00000[4-9]")):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        if "ray::train_share" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)
            return


def compare_jobs(directory: Path, workers: int, steps: int) -> bool:
    """Compare the weights of six jobs, one worker being killed, with those of one process."""
    killed: list[int] = []
    many, one = directory / "many", directory / "one"
    killer = threading.Thread(target=kill_a_worker, args=(many, killed), daemon=True)
    killer.start()
    started = time.monotonic()
    results = train_on(workers, six_jobs(directory, many, steps))
    seconds = time.monotonic() - started
    started = time.monotonic()
    loraloom.train(six_jobs(directory, one, steps))
    print(f"{workers} workers, {len(killed)} killed: {seconds:.1f} s with the workers' start")
    print(f"one process: {time.monotonic() - started:.1f} s")
    apart = [difference(many / result.job, one / result.job) for result in results]
    for result, found in zip(results, apart, strict=True):
        print(f"  {result.job:10} {result.status} {found.whole:.1e} {found.tensor:.1e}", flush=True)
    is_well = len(killed) == 1 and all(found.is_rounding for found in apart)
    print("six jobs:", "as in one process" if is_well else "NOT as in one process", flush=True)
    return is_well


def check_sweep(directory: Path, workers: int) -> bool:
    """Train a sweep on workers, and look at its table."""
    run = sweep_of_twelve(directory, directory / "sweep")
    train_on(workers, run)
    with (directory / "sweep/sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    statuses = Counter(row["status"] for row in rows)
    (best,) = [row for row in rows if row["rank"] == "1"]
    print(f"{dict(statuses)}, the best: {best['name']}")
    is_well = len(rows) == 12 and best["status"] == "finished" and statuses["stopped"] > 0
    print(f"sweep of {len(rows)}:", "as it must be" if is_well else "NOT as it must be", flush=True)
    return is_well


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, connected("auto"):
        directory = save_inputs(Path(name))
        is_well = check_sweep(directory, options.workers)
        is_well &= compare_jobs(directory, options.workers, options.steps)
    raise SystemExit(0 if is_well else 1)


if __name__ == "__main__":
    main()
