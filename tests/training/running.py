"""Running engines in tests: a matrix of jobs, to the end, to a Ctrl-C, and on from there."""

import io
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from loraloom.cli.main import main
from loraloom.data.training_set import TrainingSet
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.engine import Engine
from loraloom.training.reporting import Progress
from loraloom.training.settings import JobConfig
from tests.generation.saved import read_rows
from tests.training.toy import ADAPTERS, toy_config, toy_engine, toy_set, weights_of


class Spoken(Progress):
    """Keeps what is said."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        """Keep it."""
        self.messages.append(text)


def matrix(max_steps: int = 12, **settings: Any) -> tuple[list[JobConfig], dict[str, TrainingSet]]:
    """Jobs of all methods, with other ranks, batches, lengths and ends."""
    sizes = {"lora": (4, 2, 0), "dora": (6, 6, 4), "mixlora": (4, 4, 0), "mixdora": (3, 1, 7)}
    configs = [
        toy_config(
            method,
            ADAPTERS[method],
            seed=seed,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            max_steps=max_steps - shorter,
            learning_rate=1e-3 * (seed + 1),
            max_grad_norm=0.5,
            **settings,
        )
        for seed, (method, (batch_size, micro_batch_size, shorter)) in enumerate(sizes.items())
    ]
    sets = {
        config.name: toy_set(count=10, seed=seed, longest=6 + 5 * seed)
        for seed, config in enumerate(configs)
    }
    return configs, sets


def assert_same_files(directory: Path, expected: Path, jobs: Sequence[str]) -> None:
    """Check that adapters' files have bit-equal weights."""
    for job in jobs:
        file = f"{job}/adapter_model.safetensors"
        tensors, others = load_file(directory / file), load_file(expected / file)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in others), job


def intermediate_files(directory: Path) -> dict[str, bytes]:
    """Read the files of all intermediate adapters of a run."""
    paths = sorted(directory.glob("*/checkpoint-*/*"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def trained_weights(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    """Train all jobs to their ends."""
    jobs = list(engine.jobs.values())
    engine.run()
    return {job.name: weights_of(job) for job in jobs}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Read a job's metrics.jsonl."""
    return read_rows(directory / "metrics.jsonl")


def assert_same_metrics(directory: Path, expected: Path, jobs: Sequence[str]) -> None:
    """Check that jobs have equal lines in metrics.jsonl but for their times."""
    for job in jobs:
        lines, others = (read_metrics(root / job) for root in (directory, expected))
        assert [line | {"seconds": 0} for line in lines] == [o | {"seconds": 0} for o in others]


def interrupted(engine: Engine, after_round: int) -> None:
    """Run an engine and press Ctrl-C in a round."""
    step = engine.step

    def stepping():
        step()
        if engine.round == after_round:
            os.kill(os.getpid(), signal.SIGINT)

    engine.step = stepping
    with pytest.raises(KeyboardInterrupt):
        engine.run()


def pressing(after_round: int, number: int = signal.SIGINT) -> Callable[..., None]:
    """Make a function that presses Ctrl-C, or sends another signal, between two steps."""

    def press(engine: Engine, *_: Any) -> None:
        if engine.round == after_round:
            os.kill(os.getpid(), number)

    return press


def resumed(
    directory: Path,
    configs: Sequence[JobConfig],
    sets: Mapping[str, TrainingSet] | None = None,
    **options: Any,
) -> Engine:
    """Set up the jobs of a run that go on, where its newest snapshot has them."""
    snapshot, faults = CheckpointStore(directory / ".checkpoints").newest()
    assert faults == []
    done = {name for name, record in snapshot.jobs.items() if record.result is not None}
    configs = [config for config in configs if config.name not in done]
    engine = toy_engine(directory, configs, sets, **options)
    engine.begin(snapshot)
    return engine


def resume(run_file: str, begun: Event) -> None:
    """Do what `loraloom train RUN_FILE --resume` does in a process of its own, and end it so."""
    torch.set_num_threads(1)
    step = Engine.step

    def first_step(engine: Engine) -> None:
        begun.set()
        step(engine)

    with patch.object(Engine, "step", first_step), redirect_stdout(io.StringIO()):
        raise SystemExit(main(["train", run_file, "--resume"]))
