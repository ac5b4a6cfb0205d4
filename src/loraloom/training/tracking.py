"""Where a job's metrics go: a line of JSON for each step, and accelerate's trackers by name.

Each job has a run of its own. Everything stays on this machine unless the tracker's own settings
(environment, login) say otherwise.
"""

from __future__ import annotations

import contextvars
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

from loraloom.durable import append_line, sync
from loraloom.training.settings import TRACKERS

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
WANDB_DIRECTORY = "wandb"


@dataclass
class MetricsFile:
    """metrics.jsonl: one object a line. It is opened for each, so a fault costs one line."""

    path: Path
    name = METRICS_FILE

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, json.dumps(metrics, allow_nan=False))

    def close(self) -> None:
        if self.path.exists():
            sync(self.path)


class Tracker:
    """A tracker of accelerate's form, which is started here, with the run of a job."""

    def __init__(self, name: str, tracker: Any):
        self.name = name
        self._tracker = tracker
        PartialState()  # without it accelerate's logger raises
        # trackio's init ends the run that its context knows, so each job has its own context.
        self._context = contextvars.Context()
        self._context.run(tracker.start)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics at their step; what is no number, `warnings` that is, is left out."""
        values = {k: v for k, v in metrics.items() if k != "step" and not isinstance(v, list)}
        self._context.run(self._tracker.log, values, step=metrics["step"])

    def close(self) -> None:
        self._context.run(self._tracker.finish)


def open_tracker(
    name: str, directory: Path, first_step: int, config: Mapping[str, Any]
) -> MetricsFile | Tracker:
    project = os.environ.get(f"{name.upper()}_PROJECT", "loraloom")
    run: dict[str, Any] = {"name": directory.name, "group": directory.parent.resolve().name}
    run["config"] = dict(config)
    match name:
        case "tensorboard":
            tracker = TensorBoardTracker(TENSORBOARD_DIRECTORY, directory, purge_step=first_step)
        case "trackio":
            run |= {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
            tracker = TrackioTracker(project, **run)
        case "wandb":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            # Nothing leaves this machine unless the user says so.
            run |= {"dir": str(directory), "mode": os.environ.get("WANDB_MODE", "offline")}
            run |= {"reinit": "create_new", "settings": {"console": "off", "quiet": True}}
            tracker = WandBTracker(project, **run)
        case "jsonl":
            return MetricsFile(directory / METRICS_FILE)
        case _:
            (entry,) = entry_points(group=TRACKERS, name=name)
            tracker = entry.load()(directory, first_step, run["config"])
    return Tracker(name, tracker)
