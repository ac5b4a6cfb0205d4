"""What a run says while it goes on: metrics to trackers, lines to the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loraloom.durable import sync
from loraloom.training.run.job import Job
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.tracking import MetricsFile, Tracker, open_tracker, step_metrics
from loraloom.training.step.micro_batch import StepReport


class Reporter:
    """Tells trackers and the user how jobs get on. A tracker that fails is told of once a job."""

    def __init__(self, directory: RunDirectory, progress: Progress, tracker_names: tuple[str, ...]):
        self._directory = directory
        self._progress = progress
        self._tracker_names = [] if directory.is_read_only else ["jsonl", *tracker_names]
        self._trackers: dict[str, list[MetricsFile | Tracker]] = {}
        self._failing: set[tuple[str, str]] = set()
        self._is_started = False

    def start(self, jobs: Iterable[Job]) -> None:
        """Open the trackers of jobs and begin to show them."""
        self._is_started = True
        self._progress.start()
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> None:
        """Open a job's trackers and show it, if the run has begun."""
        if not self._is_started:
            return
        directory, config = self._directory.job(job.name), job.config.model_dump(mode="json")
        trackers = self._trackers[job.name] = []
        for name in dict.fromkeys(self._tracker_names):
            with self._noting_faults(name, job.name):
                trackers.append(open_tracker(name, directory, job.position.step + 1, config))
        self._progress.add(job.name, job.total_steps, job.position)

    def step(self, job: Job, report: StepReport, seconds: float) -> None:
        """Tell what a step did."""
        self._log(job.name, step_metrics(report, seconds))
        if self._is_started:
            self._progress.update(job.name, job.total_steps, job.position)
        for warning in report.warnings:
            self.message(f"warning: job {job.name}, {warning}")

    def evaluation(self, job: Job, metrics: Mapping[str, float], seconds: float) -> None:
        """Tell what was measured after a job's last step."""
        step = job.position.step
        place = {"step": step, "epoch": round(job.order.epochs_after(step), 4)}
        self._log(job.name, {**place, **metrics, "seconds": round(seconds, 3)})
        described = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.message(f"{job.name}: step {step}, {described}")

    def message(self, text: str) -> None:
        """Say something to the user."""
        self._progress.message(text)

    def end(self, job_name: str) -> None:
        """Close a job's trackers."""
        for tracker in self._trackers.pop(job_name, ()):
            with self._noting_faults(tracker.name, job_name):
                tracker.close()

    def stop(self) -> None:
        """Close all trackers and show nothing more."""
        self._is_started = False
        self._progress.stop()
        for name in list(self._trackers):
            self.end(name)

    def metrics_bytes(self, job_name: str) -> int:
        """Return the length of a job's metrics.jsonl, all of which is on the disk then."""
        metrics = self._directory.metrics(job_name)
        if not metrics.exists():
            return 0
        if job_name in self._trackers:
            sync(metrics)
        return metrics.stat().st_size

    @contextmanager
    def _noting_faults(self, tracker_name: str, job_name: str) -> Iterator[None]:
        """Tell of a tracker's fault (a full disk, for example) once; it ends no training."""
        try:
            yield
        except Exception as error:
            if (tracker_name, job_name) not in self._failing:
                self.message(f"warning: job {job_name}: {tracker_name} can't take metrics: {error}")
            self._failing.add((tracker_name, job_name))

    def _log(self, job_name: str, metrics: Mapping[str, Any]) -> None:
        for tracker in self._trackers.get(job_name, ()):
            with self._noting_faults(tracker.name, job_name):
                tracker.log(metrics)
