"""The loop: jobs take fused steps together, are measured, saved, and leave when they are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraloom.errors import ConfigError, TrainingError
from loraloom.formats.files import read_adapter
from loraloom.models.host import Host
from loraloom.train.checkpoint import KEPT_SNAPSHOTS, JobRecord, Snapshot, Status
from loraloom.train.evaluation import Evaluation
from loraloom.train.fitting import StepRunner
from loraloom.train.interruption import Interruption
from loraloom.train.job import Job
from loraloom.train.micro_batch import StepReport
from loraloom.train.outputs import RunDirectory
from loraloom.train.progress import Progress
from loraloom.train.reference import drop_reference
from loraloom.train.reporting import Reporter
from loraloom.train.results import JobResult, job_result, read_result, result_card


@dataclass(frozen=True)
class Surroundings:
    """What an engine tells and writes to.

    Args:
        directory: Of the run's results.
        progress: Shows the run.
        trackers: Names of trackers, as in a run file.
        environment: Goes into each result.json.
    """

    directory: RunDirectory
    progress: Progress
    trackers: tuple[str, ...] = ("jsonl",)
    environment: Mapping[str, Any] | None = None


class Engine:
    """Jobs that share one base model and its forwards.

    Call `run`; or `step`, `evaluate`, `close` and `save_state` from a loop of one's own. Jobs may
    join (`add`) and be ended (`stop`) before a run and between two of its steps.

    Gradient checkpointing is a matter of the whole forward: it is on if any job in it asks for it.
    Gradients are the same.

    Args:
        host: The base model with the jobs' adapters.
        jobs: Each with an adapter on the host.
        evaluation: What jobs are measured on.
        surroundings: Where results and messages go.
    """

    def __init__(
        self, host: Host, jobs: Sequence[Job], evaluation: Evaluation, surroundings: Surroundings
    ):
        self.host = host
        self.jobs: dict[str, Job] = {}
        self.results: dict[str, JobResult] = {}
        self.round = 0
        self._records: dict[str, JobRecord] = {}
        self._interruption: Interruption | None = None
        self._evaluation = evaluation
        self._directory = surroundings.directory
        self._environment = dict(surroundings.environment or {})
        self._reporter = Reporter(
            surroundings.directory, surroundings.progress, surroundings.trackers
        )
        self._runner = StepRunner(host, evaluation.pad_id)
        self._started_at = time.monotonic()
        self._save_due = False
        for job in jobs:
            self._enter(job, joined_later=False)

    @property
    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed one included."""
        return time.monotonic() - self._started_at

    @property
    def base(self) -> dict[str, Any]:
        """The base model and how it computes, as snapshots have it."""
        return describe_base(self.host)

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C was pressed: the run ends after what is being done."""
        return self._interruption is not None and self._interruption.requested

    def run(self, between_steps: Callable[[Engine], None] | None = None) -> list[JobResult]:
        """Train until all jobs are done.

        Args:
            between_steps: Called before each fused step and when no job is left. It may add jobs
                and stop some. The run ends when there are none after it.

        Returns:
            What became of each job, in their order.

        Raises:
            KeyboardInterrupt: After Ctrl-C, when everything is saved; at once after another.
        """
        self._reporter.start(list(self.jobs.values()))
        try:
            with Interruption(self._announce_stop) as self._interruption:
                self._loop(between_steps)
        finally:
            self._interruption = None
            self._reporter.stop()
        return [self.results[name] for name in self._records]

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let a job join. It takes part from the next fused step on, and snapshots have it.

        Args:
            job: With its adapter on the host; see `JobBuilder`.
            overwrite: Replace the results of an earlier run's job of that name.

        Raises:
            ConfigError: If its name is taken or results are in the way. The job is off the host.
        """
        try:
            self._check_new(job.name)
            self._directory.prepare_job(job.name, overwrite=overwrite)
        except ConfigError:
            self._take_off(job)
            raise
        self._enter(job, joined_later=True)
        self._reporter.add(job)
        self._save_due = True

    def stop(self, name: str, reason: str) -> JobResult:
        """End a job now. Its files are written as at its end, with the reason in result.json.

        The micro-batches of a half-done step are of no use then. Weights that are not finite make
        it a failed job.

        Args:
            name: Of a job that is not done.
            reason: For people.

        Raises:
            ConfigError: If there is no such job.
        """
        if name not in self.jobs:
            running = ", ".join(self.jobs) or "none"
            raise ConfigError(f"job must be one of those that train ({running}), got {name!r}")
        job = self.jobs[name]
        if self._has_sound_weights(job):
            self.close(job, stop_reason=reason)
            self._reporter.message(f"{name}: stopped after step {job.position.step}: {reason}")
        return self.results[name]

    def step(self) -> None:
        """Let every job take its next micro-batch, and its step where that was the last one."""
        jobs = list(self.jobs.values())
        if not self.host.training:
            self.host.train()
        self.host.enable_gradient_checkpointing(
            any(job.config.train.gradient_checkpointing for job in jobs)
        )
        parts = [job.micro_batch() for job in jobs]
        outcomes = self._runner.run(parts)
        self.round += 1
        for job, part, outcome in zip(jobs, parts, outcomes, strict=True):
            try:
                report = job.accept(part, outcome)
            except TrainingError as error:
                self._fail(job, error)
                continue
            if report is not None:
                self._report_step(job, report)

    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Measure jobs between two of their steps, and keep their weights if they are the best."""
        sound = [job for job in jobs if self._has_sound_weights(job)]
        for name, metrics in self._evaluation.measure(sound).items():
            job = self.jobs[name]
            try:
                is_best = job.take_evaluation(metrics)
            except TrainingError as error:
                self._fail(job, error)
                continue
            if is_best:
                self.host.save(name, self._directory.best(name), overwrite=True)
            self._reporter.evaluation(job, metrics, self.seconds)
        self._save_due = True

    def close(
        self, job: Job, error: str | None = None, stop_reason: str | None = None
    ) -> JobResult:
        """Write a job's files and take its adapter off the host.

        The adapter's files are its best weights where an evaluation has chosen any, else the last.

        Args:
            job: That trains.
            error: Why it failed.
            stop_reason: Why it was stopped.
        """
        name, directory = job.name, self._directory.job(job.name)
        self.host.save(name, self._directory.last(name), overwrite=True)
        if job.selection.step is not None:
            job.adapter.load_tensors(read_adapter(self._directory.best(name), self.host.base)[1])
        result = job_result(
            job,
            self.host.base,
            directory,
            error=error,
            stop_reason=stop_reason,
            seconds=self.seconds,
            environment=self._environment,
        )
        card = result_card(result, job, self.host.base)
        self.host.save(name, directory, card, overwrite=True)
        result.write(directory)
        self._leave(job, result)
        return result

    def save_state(self) -> None:
        """Write a snapshot of all jobs.

        Raises:
            TrainingError: If it can't be written.
        """
        states = {
            name: job.state_dict()
            for name, job in self.jobs.items()
            if job.position.tokens > 0  # before, the seed says it all
        }
        keep = KEPT_SNAPSHOTS if self.jobs else 1
        records = {name: self._record(name) for name in self._records}
        store = self._directory.snapshots
        store.write(self.round, self.seconds, self.base, records, states, keep)
        self._save_due = False

    def load_state(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; jobs that it doesn't know begin.

        Jobs that it calls done must not be on the host: their results are read.

        Raises:
            ConfigError: If the results of a job that was done are gone.
        """
        self.round = snapshot.round
        self._started_at = time.monotonic() - snapshot.seconds
        for name, record in snapshot.jobs.items():
            if record.status != "running":
                self.results[name] = self._read_result(name)
            elif (state := snapshot.load_state(name)) is not None:
                self.jobs[name].load_state_dict(state)
        new = {name: record for name, record in self._records.items() if name not in snapshot.jobs}
        self._records = {**snapshot.jobs, **new}
        for name in self.jobs:
            self._reporter.forget_after(name, self._records[name].metrics_bytes)
        self._save_due = False

    def _loop(self, between_steps: Callable[[Engine], None] | None) -> None:
        while True:
            if self.is_interrupted:
                self.save_state()
                self._reporter.message("saved; --resume goes on from here")
                raise KeyboardInterrupt
            self._evaluate_due()
            self._close_complete()
            if between_steps is not None:
                between_steps(self)
            if self._save_due:
                self.save_state()
            if self.is_interrupted:
                continue
            if not self.jobs:
                return
            self.step()

    def _evaluate_due(self) -> None:
        due = [job for job in self.jobs.values() if _is_evaluation_due(job)]
        if due:
            self.evaluate(due)

    def _close_complete(self) -> None:
        for job in [job for job in self.jobs.values() if job.is_complete]:
            if self._has_sound_weights(job):
                self._reporter.message(f"{job.name}: done, {self.close(job).directory}")

    def _has_sound_weights(self, job: Job) -> bool:
        """Check a job's weights; end it if they are not finite."""
        try:
            job.check_weights()
        except TrainingError as error:
            self._fail(job, error)
            return False
        return True

    def _fail(self, job: Job, error: TrainingError) -> None:
        job.restore_proven_weights()
        self.close(job, str(error))
        self._reporter.message(f"error: {error}")

    def _check_new(self, name: str) -> None:
        taken = [other for other in self._records if other.casefold() == name.casefold()]
        if taken:
            raise ConfigError(f"job name must be new in this run, got {name!r} again")

    def _enter(self, job: Job, *, joined_later: bool) -> None:
        self.jobs[job.name] = job
        settings = job.config.model_dump(mode="json")
        self._records[job.name] = JobRecord("running", settings, joined_later=joined_later)

    def _leave(self, job: Job, result: JobResult) -> None:
        job.release()
        self.results[job.name] = result
        del self.jobs[job.name]
        self._take_off(job)
        self._reporter.end(job.name)
        self._save_due = True

    def _take_off(self, job: Job) -> None:
        """Free a job's adapter, and its reference's if no other job is held at it."""
        self.host.remove(job.name)
        others = [other.reference for other in self.jobs.values()]
        drop_reference(self.host, job.reference, others)

    def _report_step(self, job: Job, report: StepReport) -> None:
        self._reporter.step(job, report, self.seconds)
        save_steps = job.config.train.save_steps
        if save_steps is not None and report.step % save_steps == 0:
            self._save_due = True

    def _record(self, name: str) -> JobRecord:
        status = _status(self.results[name]) if name in self.results else "running"
        metrics_bytes = self._reporter.metrics_bytes(name)
        record = self._records[name]
        return replace(record, status=status, metrics_bytes=metrics_bytes, sha256=None)

    def _read_result(self, name: str) -> JobResult:
        try:
            return read_result(self._directory.job(name))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--resume: job {name} was done, but its result can't be read: {error}; "
                "give --overwrite to train it again"
            ) from error

    def _announce_stop(self) -> None:
        self._reporter.message("saving everything after this step; Ctrl-C again stops at once")


def describe_base(host: Host) -> dict[str, Any]:
    """Say which base model it is and how it computes, for snapshots."""
    return {
        "name": host.base.name_or_path,
        "fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
    }


def _status(result: JobResult) -> Status:
    """Say what became of a job, as snapshots have it."""
    return "finished" if result.status == "stopped early" else result.status


def _is_evaluation_due(job: Job) -> bool:
    position, eval_steps = job.position, job.config.train.eval_steps
    is_measured = bool(job.training_set.validation or job.config.eval)
    if not is_measured or not job.at_boundary or position.evaluated_step == position.step:
        return False
    is_milestone = job.is_complete or position.step in job.milestones
    return is_milestone or (eval_steps is not None and position.step % eval_steps == 0)
