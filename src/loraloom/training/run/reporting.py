"""What a run says while it goes on: metrics to trackers, lines to the user."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loraloom.training.run.job import Job
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import JobProgress, Progress, describe_metrics
from loraloom.training.run.tracking import Tracker, open_trackers, step_metrics
from loraloom.training.step.micro_batch import StepReport


class Reporter:
    """Tells trackers and the user how jobs get on.

    Args:
        directory: Of the run's results.
        progress: Shows the run.
        tracker_names: As in a run file.
    """

    def __init__(self, directory: RunDirectory, progress: Progress, tracker_names: tuple[str, ...]):
        self._directory = directory
        self._progress = progress
        self._tracker_names = tracker_names
        self._trackers: dict[str, list[Tracker]] = {}
        self._silent: set[Tracker] = set()
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
        directory, first_step = self._directory.job(job.name), job.position.step + 1
        directory.mkdir(parents=True, exist_ok=True)
        self._trackers[job.name] = open_trackers(
            self._tracker_names, directory, first_step, job.config.model_dump(mode="json")
        )
        self._progress.add(_progress_of(job, None))

    def step(self, job: Job, report: StepReport, seconds: float) -> None:
        """Tell what a step did."""
        self._log(job.name, step_metrics(report, seconds))
        self._progress.update(_progress_of(job, report.loss.loss))
        for warning in report.warnings:
            self.message(f"warning: job {job.name}, {warning}")

    def evaluation(self, job: Job, metrics: Mapping[str, float], seconds: float) -> None:
        """Tell what was measured after a job's last step."""
        step = job.position.step
        place = {"step": step, "epoch": round(job.order.epochs_after(step), 4)}
        self._log(job.name, {**place, **metrics, "seconds": round(seconds, 3)})
        self.message(f"{job.name}: step {step}, {describe_metrics(metrics)}")

    def message(self, text: str) -> None:
        """Say something to the user."""
        self._progress.message(text)

    def end(self, job_name: str) -> None:
        """Close a job's trackers."""
        for tracker in self._trackers.pop(job_name, ()):
            with self._noting_faults(tracker, job_name):
                tracker.close()
            self._silent.discard(tracker)

    def stop(self) -> None:
        """Close all trackers and show nothing more."""
        self._is_started = False
        self._progress.stop()
        for name in list(self._trackers):
            self.end(name)

    def metrics_bytes(self, job_name: str) -> int:
        """Return the length of a job's metrics.jsonl."""
        metrics = self._directory.metrics(job_name)
        return metrics.stat().st_size if metrics.exists() else 0

    def forget_after(self, job_name: str, num_bytes: int) -> None:
        """Cut a job's metrics.jsonl: what followed will be logged again."""
        if self.metrics_bytes(job_name) > num_bytes:
            with self._directory.metrics(job_name).open("r+b") as file:
                file.truncate(num_bytes)

    @contextmanager
    def _noting_faults(self, tracker: Tracker, job_name: str) -> Iterator[None]:
        """Let a tracker's fault, a full disk say, be said once and not end the training."""
        try:
            yield
            self._silent.discard(tracker)
        except Exception as error:
            if tracker not in self._silent:
                self.message(
                    f"warning: job {job_name}: {type(tracker).__name__} can't take metrics: {error}"
                )
            self._silent.add(tracker)

    def _log(self, job_name: str, metrics: Mapping[str, Any]) -> None:
        for tracker in self._trackers.get(job_name, ()):
            with self._noting_faults(tracker, job_name):
                tracker.log(metrics)


def _progress_of(job: Job, loss: float | None) -> JobProgress:
    position = job.position
    return JobProgress(
        job.name, position.step, job.total_steps, position.tokens, loss, position.computed_tokens
    )
