"""Where a job's metrics go: a line of JSON for each step, and trackers by name.

trackio and wandb get a run for each job. A resumed job goes on in its run: the run's id is kept
beside the job's files. Both keep everything on this machine unless their own settings (environment,
login) say otherwise.
"""

from __future__ import annotations

import contextvars
import importlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from loraloom.durable import write_text
from loraloom.errors import ConfigError
from loraloom.training.step.micro_batch import StepReport

METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "tracker_run_id.txt"
TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_DIRECTORY = "wandb"
DEFAULT_PROJECT = "loraloom"

_NEEDED_MODULES = {
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}

Metrics = dict[str, float | int | list[str] | None]


def step_metrics(report: StepReport, seconds: float) -> Metrics:
    """Name what a step did, as metrics.jsonl has it.

    `tokens`, `computed_tokens` (with padding) and `seconds` are totals since the job and the run
    began; `loss` is the objective's over the whole step, `aux_loss` the router losses with their
    coefficients. `warnings` are there only after a step that gave some.
    """
    loss = report.loss
    metrics: Metrics = {
        "step": report.step,
        "epoch": round(report.epoch, 4),
        "loss": loss.loss,
        "aux_loss": loss.aux_loss,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "tokens": report.tokens,
        "computed_tokens": report.computed_tokens,
        "seconds": round(seconds, 3),
    }
    if loss.router_entropy is not None:
        metrics["router/entropy"] = loss.router_entropy
        metrics["router/load_cv"] = loss.router_load_cv
    if report.warnings:
        metrics["warnings"] = list(report.warnings)
    return metrics | loss.metrics


class Tracker(ABC):
    """Takes a job's metrics."""

    @abstractmethod
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step or of an evaluation; `step` is among them.

        What is no number, `warnings` that is, goes to metrics.jsonl alone.
        """

    @abstractmethod
    def close(self) -> None:
        """Write what is left."""


class MetricsFile(Tracker):
    """metrics.jsonl: one object a line.

    Args:
        path: Appended to.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard(Tracker):
    """Scalars by step, in TensorBoard's event files.

    Args:
        directory: Where they go.
        first_step: What older files say of this step and later ones is dropped.
    """

    def __init__(self, directory: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Add each metric but the step as a scalar."""
        values, step = _at_step(metrics)
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a job.

    Args:
        id: The same as long as the job is resumed.
        job: The job's name.
        group: The name of the run's directory, which its jobs have in common.
        config: The job's section of the run file, all defaults filled in.
    """

    id: str
    job: str
    group: str
    config: Mapping[str, Any]


class Trackio(Tracker):
    """A run of trackio, in the project TRACKIO_PROJECT or `loraloom`.

    Args:
        run: Of which job.
    """

    def __init__(self, run: TrackedRun):
        import trackio  # pyright: ignore[reportMissingImports]

        # init ends the run that its context knows, so each job has a context of its own
        self._context = contextvars.Context()
        self._run: Any = self._context.run(
            trackio.init,
            project=os.environ.get("TRACKIO_PROJECT", DEFAULT_PROJECT),
            name=f"{run.job}-{run.id[:8]}",
            group=run.group,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics at their step."""
        self._context.run(self._run.log, *_at_step(metrics))

    def close(self) -> None:
        """Write what is left."""
        self._context.run(self._run.finish)


class Wandb(Tracker):
    """A run of Weights & Biases, in the project WANDB_PROJECT or `loraloom`.

    Without WANDB_MODE and without credentials it is offline; `wandb sync` can send it later.

    Args:
        run: Of which job.
        directory: Where wandb puts its files.
    """

    def __init__(self, run: TrackedRun, directory: Path):
        _mute_wandb_reports()
        import wandb  # pyright: ignore[reportMissingImports]

        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", DEFAULT_PROJECT),
            id=run.id,
            name=run.job,
            group=run.group,
            config=dict(run.config),
            dir=str(directory),
            mode=None if _has_wandb_settings(wandb) else "offline",
            resume="allow",
            reinit="create_new",  # jobs have runs side by side
            settings=wandb.Settings(console="off", quiet=True),
        )

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics at their step."""
        self._run.log(*_at_step(metrics))

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def read_curve(metrics_file: Path, name: str) -> list[tuple[int, float]]:
    """Read one figure's course, (step, value), from a job's metrics.jsonl."""
    lines = map(json.loads, metrics_file.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[name]) for line in lines if name in line]


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that what trackers need is installed.

    Raises:
        ConfigError: If it isn't; says what to install.
    """
    if "wandb" in names:
        _mute_wandb_reports()
    for name in names:
        if name not in _NEEDED_MODULES:
            continue
        try:
            importlib.import_module(_NEEDED_MODULES[name])
        except ImportError as error:
            raise ConfigError(
                f"trackers: {name} needs a package that is not installed; "
                "run: pip install 'loraloom[track]'"
            ) from error


def open_trackers(
    names: tuple[str, ...], directory: Path, first_step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """Open a job's trackers; metrics.jsonl is always among them.

    Args:
        names: As in a run file.
        directory: Of the job.
        first_step: The first step that will be logged.
        config: The job's section of the run file.
    """
    trackers: list[Tracker] = [MetricsFile(directory / METRICS_FILE)]
    if "tensorboard" in names:
        trackers.append(TensorBoard(directory / TENSORBOARD_DIRECTORY, first_step))
    if "trackio" in names:
        trackers.append(Trackio(_tracked_run(directory, config)))
    if "wandb" in names:
        trackers.append(Wandb(_tracked_run(directory, config), directory))
    return trackers


def _tracked_run(directory: Path, config: Mapping[str, Any]) -> TrackedRun:
    file = directory / RUN_ID_FILE
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    group = directory.parent.resolve().name
    return TrackedRun(file.read_text(encoding="utf-8"), directory.name, group, config)


def _at_step(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Take the step out of metrics, and leave out what is no number."""
    values = {
        name: value
        for name, value in metrics.items()
        if name != "step" and not isinstance(value, list)
    }
    return values, metrics["step"]


def _mute_wandb_reports() -> None:
    """Keep wandb from sending reports of its own errors, unless the user wants it to."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _has_wandb_settings(wandb: Any) -> bool:
    """Whether the user has told wandb where its data may go."""
    return "WANDB_MODE" in os.environ or bool(wandb.login(prompt=False, verify=False))
