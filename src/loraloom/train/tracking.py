"""Where a job's metrics go: a line of JSON for each step, and TensorBoard if wanted."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from loraloom.errors import ConfigError
from loraloom.train.micro_batch import StepReport

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

Metrics = dict[str, float | int | None]


def step_metrics(report: StepReport, seconds: float) -> Metrics:
    """Name what a step did, as metrics.jsonl has it.

    `tokens` and `seconds` are totals since the job and the run began; `loss` is the objective's
    over the whole step, `aux_loss` the router losses with their coefficients.
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
        "seconds": round(seconds, 3),
    }
    if loss.router_entropy is not None:
        metrics["router/entropy"] = loss.router_entropy
        metrics["router/load_cv"] = loss.router_load_cv
    return metrics | loss.metrics


class Tracker(ABC):
    """Takes a job's metrics."""

    @abstractmethod
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of a step or of an evaluation; `step` is among them."""

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
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, global_step=metrics["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that what trackers need is installed.

    Raises:
        ConfigError: If it isn't; says what to install.
    """
    if "tensorboard" not in names:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "trackers: tensorboard needs a package that is not installed; "
            "run: pip install 'loraloom[track]'"
        ) from error


def open_trackers(names: tuple[str, ...], directory: Path, first_step: int) -> list[Tracker]:
    """Open a job's trackers; metrics.jsonl is always among them.

    Args:
        names: As in a run file.
        directory: Of the job.
        first_step: The first step that will be logged.
    """
    trackers: list[Tracker] = [MetricsFile(directory / METRICS_FILE)]
    if "tensorboard" in names:
        trackers.append(TensorBoard(directory / TENSORBOARD_DIRECTORY, first_step))
    return trackers
