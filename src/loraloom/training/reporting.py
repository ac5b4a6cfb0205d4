"""Reports of a run to its user and to trackers, and the signals that end it.

Metrics go to a file and to accelerate's trackers by name, in which each job has a run of its own.
Everything stays on this machine unless the tracker's own settings (environment, login) say
otherwise.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from loraloom.atomic_io import append_line, sync
from loraloom.config.run_files import METRICS_FILE
from loraloom.errors import ConfigError, plain
from loraloom.terminal import make_console
from loraloom.training.job import Job
from loraloom.training.run_directory import TENSORBOARD_DIRECTORY, RunDirectory
from loraloom.training.settings import TrackerName

PLAIN_INTERVAL_S = 60.0
# Their libraries have one current run in a process.
SINGLE_RUN_TRACKERS = ("clearml", "comet_ml", "swanlab")
# Jobs that a line of a log names.
MAX_JOBS_OF_LINE = 4
NOTICE = "saving a checkpoint after this step; press Ctrl-C again to stop at once"
_HANGUP = getattr(signal, "SIGHUP", None)  # a terminal that is closed; Windows has none


class Progress:
    """Shows a run to its user: a live table on a terminal, else a line of all jobs a minute."""

    def __init__(self, console: Console | None = None, interval_s: float = PLAIN_INTERVAL_S):
        self._console = console or make_console(quiet=True)
        # A closed pipe ends no training: what would be printed is lost.
        self._console.on_broken_pipe = partial(setattr, self._console, "quiet", True)
        if isinstance(self._console.file, io.TextIOWrapper):
            self._console.file.reconfigure(errors="backslashreplace")
        self._is_live = console is not None and console.is_terminal
        self._interval_s = interval_s
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(10),
            MofNCompleteColumn(),
            "loss {task.fields[loss]} {task.fields[rate]} tokens/s ETA",
            TimeRemainingColumn(),
            TextColumn("{task.fields[measured]}", markup=False),
            console=self._console,
            disable=not self._is_live,
            speed_estimate_period=120.0,
        )
        self._tasks: dict[str, Task] = {}
        self._has_stepped = False
        self._due_at = 0.0

    def start(self) -> None:
        self._bars.start()

    def add(self, job: Job) -> None:
        position = job.position
        begun = (time.monotonic(), position.tokens)
        fields = {"loss": "-", "rate": 0, "measured": "", "begun": begun}
        self._bars.add_task(job.name, total=job.total_steps, completed=position.step, **fields)  # ty: ignore[invalid-argument-type]
        self._tasks[job.name] = self._bars.tasks[-1]
        self._due_at = 0.0

    def update(self, job: Job) -> None:
        task = self._tasks[job.name]
        position = job.position
        began_at, tokens = task.fields["begun"]
        rate = round((position.tokens - tokens) / max(time.monotonic() - began_at, 1e-3))
        loss = f"{position.last_loss:.4f}"
        self._bars.update(task.id, completed=position.step, loss=loss, rate=rate)
        self._has_stepped = True
        if task.finished:
            self._due_at = 0.0

    def measure(self, job: Job, metrics: Mapping[str, float]) -> None:
        described = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bars.update(self._tasks[job.name].id, measured=described)
        if not self._is_live:
            self.message(f"{job.name}: step {job.position.step}, {described}")

    def flush(self) -> None:
        """Print a line of all jobs that train, if it is time."""
        tasks = [task for task in self._tasks.values() if task.fields["loss"] != "-"]
        is_due = self._has_stepped and time.monotonic() >= self._due_at
        if self._is_live or not tasks or not is_due:
            return
        self._has_stepped = False
        self._due_at = time.monotonic() + self._interval_s
        parts = []
        for task in tasks[:MAX_JOBS_OF_LINE]:
            progress = f"step {task.completed:.0f}/{task.total:.0f}, loss {task.fields['loss']}"
            parts.append(f"{task.description}: {progress}")
        if len(tasks) > MAX_JOBS_OF_LINE:
            parts.append(f"{len(tasks) - MAX_JOBS_OF_LINE} more jobs")
        rate = sum(task.fields["rate"] for task in tasks)
        seconds = max([task.time_remaining or 0 for task in tasks])
        remaining = timedelta(seconds=round(seconds)) if seconds else "-"
        self.message(f"{'; '.join(parts)}; {rate} tokens/s, ETA {remaining}")

    def end(self, job_name: str) -> None:
        """Leave a job that has ended out of further lines."""
        self._tasks.pop(job_name, None)

    def message(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a full disk; a file that was closed
            self._console.print(Text(plain(text)), soft_wrap=not self._is_live)

    def stop(self) -> None:
        self._bars.stop()


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

    def __init__(self, name: str, tracker: GeneralTracker):
        self.name = name
        self._tracker = tracker
        PartialState()  # without it accelerate's logger raises
        # MLflow has one current run in a thread, and trackio one in a context.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        try:
            self._call(tracker.start)
        except BaseException:
            self._thread.shutdown()
            raise

    def store_configuration(self, config: Mapping[str, Any]) -> None:
        self._call(self._tracker.store_init_configuration, flatten(config))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics at their step; what is no number, `warnings` that is, is left out."""
        values = {k: v for k, v in metrics.items() if k != "step" and not isinstance(v, list)}
        self._call(partial(self._tracker.log, values, step=metrics["step"]))

    def close(self) -> None:
        try:
            self._call(self._tracker.finish)
        finally:
            self._thread.shutdown()

    def _call(self, function: Callable[..., object], *args: object) -> None:
        self._thread.submit(function, *args).result()


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Name nested settings by their paths, `train.batch_size`; what is null is left out."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str | int | float):
            flat[f"{prefix}{name}"] = value
        elif value is not None:
            flat[f"{prefix}{name}"] = json.dumps(value)
    return flat


def check_trackers(names: Iterable[TrackerName], num_jobs: int) -> None:
    for name in names:
        if name != "jsonl" and name not in map(str, get_available_trackers()):
            _check_package(name)
        is_single = name in SINGLE_RUN_TRACKERS
        if name == "mlflow":
            is_single = "MLFLOW_RUN_ID" in os.environ
        if is_single and num_jobs > 1:
            raise ConfigError(
                f"trackers: {name} holds a single run in a process, got {num_jobs} jobs that train "
                "together. Train each job in a separate run, or choose another tracker."
            )


def _check_package(name: TrackerName) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ConfigError(
            f"trackers: {name} requires the package {package}, which cannot be imported "
            f"({error}). Run `pip install {package}`, or remove {name} from trackers."
        ) from error


def open_tracker(
    name: TrackerName, directory: Path, first_step: int, config: Mapping[str, Any]
) -> MetricsFile | Tracker:
    if name == "jsonl":
        return MetricsFile(directory / METRICS_FILE)
    project = os.environ.get(f"{name.upper()}_PROJECT", "loraloom")
    settings = _tracker_settings(name, directory, first_step, config)
    # TensorBoard names a subdirectory of the job's by it.
    title = TENSORBOARD_DIRECTORY if name == "tensorboard" else project
    tracker = Tracker(name, LOGGER_TYPE_TO_CLASS[name](title, **settings))
    # A resumed job adds to TensorBoard's and DVCLive's files, which have the configuration.
    if "config" not in settings and (first_step == 1 or name not in ("tensorboard", "dvclive")):
        tracker.store_configuration(config)
    return tracker


def _tracker_settings(
    name: TrackerName, directory: Path, first_step: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a tracker's own library is started with; its environment decides the rest."""
    job = directory.name
    group = directory.parent.resolve().name
    run = {"name": job, "group": group, "config": dict(config)}
    match name:
        case "tensorboard":
            return {"logging_dir": directory, "purge_step": first_step}
        case "trackio":
            return {**run, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        case "wandb":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            # Nothing leaves this machine unless the user says so.
            run |= {"dir": str(directory), "mode": os.environ.get("WANDB_MODE", "offline")}
            return {**run, "reinit": "create_new", "settings": {"console": "off", "quiet": True}}
        case "swanlab":
            mode = os.environ.get("SWANLAB_MODE", "offline")
            log_directory = str(directory / "swanlab")
            names = {"experiment_name": job, "group": group}
            return {**names, "config": dict(config), "mode": mode, "logdir": log_directory}
        case "mlflow":
            return {"run_name": job, "tags": {"group": group}}
        case "aim":
            return {"experiment": group}
        case "clearml":
            return {"task_name": job, "tags": [group]}
        case "dvclive":
            live_directory = str(directory / "dvclive")
            is_resumed = first_step > 1
            return {"dir": live_directory, "resume": is_resumed, "save_dvc_exp": False}
        case _:
            return {}


class Reporter:
    """Logs to trackers and shows how jobs get on; a tracker that fails ends no training."""

    def __init__(
        self, directory: RunDirectory, progress: Progress, tracker_names: Sequence[TrackerName]
    ):
        self.message, self.flush = progress.message, progress.flush
        self._directory = directory
        self._progress = progress
        self._tracker_names = tracker_names
        self._trackers: dict[str, list[MetricsFile | Tracker]] = {}
        self._failing: set[tuple[str, str]] = set()

    @contextmanager
    def showing(self, jobs: Iterable[Job]) -> Iterator[None]:
        self._progress.start()
        try:
            for job in jobs:
                self.add(job)
            yield
        finally:
            self._progress.stop()
            for name in list(self._trackers):
                self.end(name)

    def add(self, job: Job) -> None:
        directory, config = self._directory.job(job.name), job.config.model_dump(mode="json")
        trackers = self._trackers[job.name] = []
        for name in dict.fromkeys(self._tracker_names):
            with self._noting_faults(name, job.name):
                check_trackers([name], len(self._trackers))
                trackers.append(open_tracker(name, directory, job.position.step + 1, config))
        self._progress.add(job)
        for warning in job.warnings:
            self.message(f"warning: job {job.name}: {warning}")

    def step(self, job: Job, metrics: Mapping[str, Any], seconds: float) -> None:
        self._log(job.name, {**metrics, "seconds": round(seconds, 3)})
        if job.name in self._trackers:
            self._progress.update(job)
        for warning in metrics.get("warnings", ()):
            self.message(f"warning: job {job.name}, {warning}")

    def evaluation(self, job: Job, metrics: Mapping[str, float], seconds: float) -> None:
        step = job.position.step
        position = {"step": step, "epoch": round(job.order.epochs_after(step), 4)}
        self._log(job.name, {**position, **metrics, "seconds": round(seconds, 3)})
        if job.name in self._trackers:
            self._progress.measure(job, metrics)

    def end(self, job_name: str) -> None:
        self._progress.end(job_name)
        for tracker in self._trackers.pop(job_name, ()):
            with self._noting_faults(tracker.name, job_name):
                tracker.close()

    def metrics_bytes(self, job_name: str) -> int:
        """Return the length of a job's metrics.jsonl, all of which is on the disk then."""
        metrics = self._directory.metrics(job_name)
        if not metrics.exists():
            return 0
        if job_name in self._trackers:
            with self._noting_faults(METRICS_FILE, job_name):
                sync(metrics)
        return metrics.stat().st_size

    @contextmanager
    def _noting_faults(self, tracker_name: str, job_name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (tracker_name, job_name) not in self._failing:
                fault = f"{tracker_name} cannot log metrics: {error}"
                self.message(f"warning: job {job_name}: {fault}; training continues without")
            self._failing.add((tracker_name, job_name))

    def _log(self, job_name: str, metrics: Mapping[str, Any]) -> None:
        for tracker in self._trackers.get(job_name, ()):
            with self._noting_faults(tracker.name, job_name):
                tracker.log(metrics)


class Interruption:
    """A context in which the first Ctrl-C, SIGTERM or SIGHUP sets a flag, the second one ends."""

    def __init__(self, say: Callable[[str], None]):
        self.requested = False
        self._say = say
        self._number: int = signal.SIGINT
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            # One that is ignored, as under nohup, stays so.
            if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
                numbers.append(_HANGUP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.requested = False

    def end(self) -> NoReturn:
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A closed terminal may send it twice, from the kernel and from the shell.
        if self.requested and number == _HANGUP:
            return
        self._number = number
        if self.requested:
            self.end()
        self.requested = True
        # The signal may have come in the midst of a write to the terminal.
        with suppress(RuntimeError):
            self._say(NOTICE)
