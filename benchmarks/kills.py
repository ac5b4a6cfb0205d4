"""Kill `loraloom train` (SIGKILL) again and again, resume it each time, compare the weights.

    python -m benchmarks.kills [--kills 20] [--steps 240] [--seed 0]

A LoRA, a DoRA, a MixLoRA and a MixDoRA job with dropout and jitter train together on a tiny base
model in float32, two of them with modules or tokens of their own, with evaluations and a snapshot
every few steps, in steps of bounded size. An
unbroken run comes first; then the same run is killed at random moments until it has been killed
often enough, and runs to its end. Weights, best weights and metrics must be equal bit by bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.training.running import resume
from tests.training.saved import run_settings, save_inputs, write_run_file

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.training.running", "loraloom.training.run"])

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "dropout": 0.1},
    "dora": {
        "method": "lora",
        "rank": 2,
        "dropout": 0.2,
        "weight_decomposition": True,
        "modules_to_save": ["lm_head", "norm"],
    },
    "mixlora": {
        "method": "mixlora",
        "rank": 2,
        "dropout": 0.1,
        "num_experts": 4,
        "router_jitter": 0.05,
        "trainable_token_indices": [5, 4, 40],
    },
    "mixdora": {
        "method": "mixlora",
        "rank": 4,
        "dropout": 0.1,
        "num_experts": 3,
        "weight_decomposition": True,
        "router_jitter": 0.02,
    },
}


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        kills: How often the process was killed.
        rounds: Fused steps of the newest snapshot after each kill; None where there was none.
        unbroken_s: Time that the unbroken run trained.
        differences: What is not equal, a line each; empty when all is well.
    """

    kills: int
    rounds: list[int | None]
    unbroken_s: float
    differences: list[str]


def check_kills(directory: Path, kills: int, steps: int, seed: int = 0) -> Outcome:
    """Train once unbroken and once with kills, and compare.

    Args:
        directory: Empty; for everything that is written.
        kills: How often to kill.
        steps: Of each job.
        seed: Of the moments.
    """
    inputs = save_inputs(directory)
    for name in ("unbroken", "killed"):
        write_run_file(directory / f"{name}.yaml", settings(inputs, directory / name, steps))
    process = _start(directory / "unbroken.yaml")
    started = time.monotonic()
    _join(process)
    unbroken_s = time.monotonic() - started
    rounds = _kill_often(directory, kills, unbroken_s, random.Random(seed))
    _join(_start(directory / "killed.yaml"))
    return Outcome(
        len(rounds),
        rounds,
        unbroken_s,
        different_files(directory / "unbroken", directory / "killed"),
    )


def settings(inputs: Path, output_dir: Path, steps: int, **train: Any) -> dict[str, Any]:
    """Make a run of four jobs of so many steps, with more settings of `train`."""
    run = run_settings(inputs, output_dir)
    template = run["jobs"][0]
    train = {**template["train"], "max_steps": steps, "eval_steps": 20, "save_steps": 3, **train}
    run["jobs"] = [
        {
            **template,
            "name": name,
            "seed": seed,
            "priority": 1 + seed / 2,
            "adapter": {"alpha": 4, **adapter},
            "train": {**train, "learning_rate": 1e-3, "micro_batch_size": (4, 2, 1, 4)[seed]},
        }
        for seed, (name, adapter) in enumerate(ADAPTERS.items())
    ]
    return {**run, "max_tokens_per_step": 800}


def _start(run_file: Path) -> BaseProcess:
    """Start a process and wait until it trains."""
    begun = _PROCESSES.Event()
    process = _PROCESSES.Process(target=resume, args=(str(run_file), begun))
    process.start()
    while not begun.wait(0.1) and process.exitcode is None:
        pass
    return process


def _kill_often(
    directory: Path, kills: int, unbroken_s: float, moments: random.Random
) -> list[int | None]:
    """Kill so many processes, each a random time after it began to train; fewer if one ends."""
    rounds: list[int | None] = []
    while len(rounds) < kills:
        process = _start(directory / "killed.yaml")
        process.join(moments.uniform(0.0, unbroken_s / kills))
        if process.exitcode is not None:
            _join(process)
            print(f"the run ended after {len(rounds)} kills; give more --steps", flush=True)
            return rounds
        process.kill()
        process.join()
        rounds.append(_newest_round(directory / "killed"))
        print(f"kill {len(rounds)}: newest snapshot at step {rounds[-1]}", flush=True)
    return rounds


def _newest_round(output_dir: Path) -> int | None:
    manifests = sorted(output_dir.glob(".checkpoints/snapshot-*/manifest.json"))
    return json.loads(manifests[-1].read_text())["round"] if manifests else None


def _join(process: BaseProcess) -> None:
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"a process ended with code {process.exitcode}")


def different_files(expected: Path, directory: Path, names: Iterable[str] = ADAPTERS) -> list[str]:
    """Name what is not bit-equal in the results of jobs of two runs."""
    differences = []
    for name in names:
        for place in ("", "checkpoints/last"):
            file = Path(name, place, "adapter_model.safetensors")
            left, right = load_file(expected / file), load_file(directory / file)
            differences += [
                f"{file}: {key}" for key in left if not torch.equal(left[key], right[key])
            ]
        if _metrics(expected / name) != _metrics(directory / name):
            differences.append(f"{name}/metrics.jsonl")
    return differences


def _metrics(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": None} for line in lines]


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=240, help="of each job")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        outcome = check_kills(Path(directory), options.kills, options.steps, options.seed)
    print(f"unbroken run {outcome.unbroken_s:.1f} s, {outcome.kills} kills")
    print("\n".join(outcome.differences) or "weights, best weights and metrics are bit-equal")
    raise SystemExit(1 if outcome.differences else 0)


if __name__ == "__main__":
    main()
