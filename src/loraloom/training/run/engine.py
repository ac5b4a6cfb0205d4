"""The loop: jobs take fused steps together, are measured, saved, and leave when they are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraloom.errors import ConfigError, LoraloomError, TrainingError
from loraloom.models.host import Host
from loraloom.training.run.checkpoint import Snapshot
from loraloom.training.run.closing import Closing, describe_fault
from loraloom.training.run.evaluation import Evaluation
from loraloom.training.run.fitting import StepRunner
from loraloom.training.run.interruption import Interruption
from loraloom.training.run.job import Job
from loraloom.training.run.memory import check_memory, predict_memory
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.reporting import Reporter
from loraloom.training.run.results import JobResult
from loraloom.training.run.roster import Roster
from loraloom.training.run.saving import Saver
from loraloom.training.run.schedule import Schedule
from loraloom.training.step.micro_batch import MicroBatch, StepReport
from loraloom.training.step.reference import drop_reference

_log = logging.getLogger(__name__)


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

    A fault of one job ends that job with its reason and its last good weights; the others go on.

    Gradient checkpointing is a matter of the whole forward: it is on if any job in it asks for it.
    Gradients are the same.

    Args:
        host: The base model with the jobs' adapters.
        jobs: Each with an adapter on the host.
        evaluation: What jobs are measured on.
        surroundings: Where results and messages go.
        max_tokens_per_step: Most tokens of a fused forward, padding included; None for no bound.
        memory_limit: Most bytes that a step may be predicted to take with a job that joins.
        keep_snapshots: How many are left when a new one is written.

    Raises:
        ConfigError: If a job does not fit into a step.
    """

    def __init__(
        self,
        host: Host,
        jobs: Sequence[Job],
        evaluation: Evaluation,
        surroundings: Surroundings,
        *,
        max_tokens_per_step: int | None = None,
        memory_limit: int | None = None,
        keep_snapshots: int = 2,
    ):
        self.host = host
        self.round = 0
        self._roster = Roster()
        self._schedule = Schedule(max_tokens_per_step)
        self._memory_limit = memory_limit
        self._keep_snapshots = keep_snapshots
        self._interruption: Interruption | None = None
        self._evaluation = evaluation
        self._directory = surroundings.directory
        self._closing = Closing(host, surroundings.directory, surroundings.environment or {})
        self._reporter = Reporter(
            surroundings.directory, surroundings.progress, surroundings.trackers
        )
        self._runner = StepRunner(host, evaluation.pad_id)
        self._started_at = time.monotonic()
        self._saver = Saver(self.save_state, self._reporter.message)
        for job in jobs:
            self._schedule.check_fits(job)
            self._enter(job, joined_later=False)

    @property
    def jobs(self) -> dict[str, Job]:
        """The jobs that train, by name."""
        return self._roster.jobs

    @property
    def results(self) -> dict[str, JobResult]:
        """What became of the others, by name."""
        return self._roster.results

    @property
    def joined(self) -> set[str]:
        """Names of the jobs that joined a run that had begun."""
        return self._roster.joined

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
        """Whether Ctrl-C or SIGTERM came: the run ends after what is being done."""
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
            SystemExit: After SIGTERM, likewise.
        """
        self._reporter.start(list(self.jobs.values()))
        try:
            with Interruption(self._announce_stop) as self._interruption:
                self._loop(between_steps)
                if self.is_interrupted:
                    self._saver.save_for_later()
                    self._interruption.end()
        finally:
            self._interruption = None
            self._reporter.stop()
        return list(self.results.values())

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let a job join. It takes part from the next fused step on, and snapshots have it.

        Args:
            job: With its adapter on the host; see `JobBuilder`.
            overwrite: Replace the results of an earlier run's job of that name.

        Raises:
            ConfigError: If its name is taken, results are in the way, or it does not fit into a
                step or into memory. The job is off the host then.
        """
        try:
            self._roster.check_new(job.name)
            self._schedule.check_fits(job)
            self._check_memory(job)
            self._directory.prepare_job(job.name, overwrite=overwrite)
            self._enter(job, joined_later=True)
        except Exception:
            self._take_off(job)
            raise
        self._saver.is_due = True
        try:
            self._reporter.add(job)
        except Exception as error:  # of a tracker, say
            self._fail(job, error)

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
            result = self.close(job, stop_reason=reason)
            if result.error is None:
                self._reporter.message(f"{name}: stopped after step {result.steps}: {reason}")
        return self.results[name]

    def step(self) -> None:
        """Let jobs take their next micro-batch, and their step where that was the last one.

        All jobs take part, or as many as max_tokens_per_step has room for.
        """
        parts = self._schedule.choose(self._micro_batches())
        if not parts:
            return
        jobs = [self.jobs[part.adapter.name] for part in parts]
        if not self.host.training:
            self.host.train()
        self.host.enable_gradient_checkpointing(
            any(job.config.train.gradient_checkpointing for job in jobs)
        )
        outcomes = self._runner.run(parts)
        self.round += 1
        self._schedule.charge(parts)
        for job, part, outcome in zip(jobs, parts, outcomes, strict=True):
            try:
                report = job.accept(part, outcome)
            except Exception as error:
                self._fail(job, error)
                continue
            if report is not None:
                self._report_step(job, report)

    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Measure jobs between two of their steps, and keep their weights if they are the best.

        Raises:
            Exception: If all evaluations raise, and so does the base model alone.
        """
        sound = [job for job in jobs if self._has_sound_weights(job)]
        outcomes = self._evaluation.measure_apart(sound)
        faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if faults and len(faults) == len(outcomes):
            self._runner.raise_if_general(faults[0])
        for job, outcome in zip(sound, outcomes, strict=True):
            try:
                metrics = self._take_evaluation(job, outcome)
            except Exception as error:
                self._fail(job, error)
                continue
            self._reporter.evaluation(job, metrics, self.seconds)
        self._saver.is_due = True

    def close(
        self, job: Job, error: str | None = None, stop_reason: str | None = None
    ) -> JobResult:
        """Write a job's files and take its adapter off the host.

        The adapter's files are its best weights where an evaluation has chosen any, else the last.
        A job whose files can't be written has failed. If it was complete, snapshots keep what a
        later process needs to write them.

        Args:
            job: That trains.
            error: Why it failed.
            stop_reason: Why it was stopped.
        """
        result, state = self._closing.close(job, self.seconds, error, stop_reason)
        if result.error != error:
            self._reporter.message(f"error: {result.error}")
        self._leave(job, result, state)
        return result

    def save_state(self) -> None:
        """Write a snapshot of all jobs.

        Raises:
            TrainingError: If it can't be written.
        """
        states = self._roster.states
        records = self._roster.records(self._reporter.metrics_bytes, self._schedule.passes)
        keep = self._keep_snapshots if states else 1
        store = self._directory.snapshots
        store.write(self.round, self.seconds, self.base, records, states, keep)
        self._saver.is_due = False

    def load_state(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; jobs that it doesn't know begin.

        Jobs that it calls done must not be on the host.
        """
        self.round = snapshot.round
        self._started_at = time.monotonic() - snapshot.seconds
        self._roster.restore(snapshot)
        running = {name: one for name, one in snapshot.jobs.items() if one.result is None}
        self._schedule.restore({name: one.scheduler_pass for name, one in running.items()})
        for name in self.jobs:
            self._reporter.forget_after(name, self._roster.metrics_bytes(name))
        self._saver.is_due = False

    def _loop(self, between_steps: Callable[[Engine], None] | None) -> None:
        while not self.is_interrupted:
            self._evaluate_due()
            self._close_complete()
            if between_steps is not None:
                between_steps(self)
            self._saver.save_if_due(may_wait=bool(self.jobs))
            if self.is_interrupted or not self.jobs:
                return
            self.step()

    def _micro_batches(self) -> list[MicroBatch]:
        """Return each job's next micro-batch; a job that has none to give ends."""
        parts = []
        for job in list(self.jobs.values()):
            try:
                parts.append(job.micro_batch())
            except Exception as error:
                self._fail(job, error)
        return parts

    def _take_evaluation(self, job: Job, outcome: dict[str, float] | Exception) -> dict[str, float]:
        """Give a job what was measured; its weights are written if they are the best."""
        if isinstance(outcome, Exception):
            raise outcome
        before = replace(job.selection)
        if job.take_evaluation(outcome):
            try:
                self.host.save(job.name, self._directory.best(job.name), overwrite=True)
            except Exception:
                job.selection = before
                raise
        return outcome

    def _evaluate_due(self) -> None:
        due = [job for job in self.jobs.values() if _is_evaluation_due(job)]
        if due:
            self.evaluate(due)

    def _close_complete(self) -> None:
        for job in [job for job in self.jobs.values() if job.is_complete]:
            if self._has_sound_weights(job):
                result = self.close(job)
                if result.error is None:
                    self._reporter.message(f"{job.name}: done, {result.directory}")

    def _has_sound_weights(self, job: Job) -> bool:
        """Check a job's weights; end it if they are not finite."""
        try:
            job.check_weights()
        except TrainingError as error:
            self._fail(job, error)
            return False
        return True

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job for a fault of its own, with its last good weights."""
        reason = str(error)
        if not isinstance(error, TrainingError):
            reason = f"job {job.name}, after step {job.position.step}: {describe_fault(error)}"
        if not isinstance(error, LoraloomError | OSError):
            _log.error("job %s failed", job.name, exc_info=error)
        self._reporter.message(f"error: {reason}")
        job.restore_proven_weights()
        self.close(job, error=reason)

    def _enter(self, job: Job, *, joined_later: bool) -> None:
        self._schedule.enter(job)
        self._roster.enter(job, joined_later=joined_later)

    def _check_memory(self, job: Job) -> None:
        if self._memory_limit is None:  # what is free can't be told from what a step has left over
            return
        jobs, bound = [*self.jobs.values(), job], self._schedule.max_tokens_per_step
        prediction = predict_memory(self.host, jobs, bound)
        try:
            check_memory(prediction, self._memory_limit, self.host.device)
        except ConfigError as error:
            raise ConfigError(f"job {job.name}: {error}") from None

    def _leave(self, job: Job, result: JobResult, state: dict[str, Any] | None) -> None:
        job.release()
        self._roster.leave(job.name, result, state)
        self._schedule.leave(job.name)
        self._take_off(job)
        self._reporter.end(job.name)
        self._saver.is_due = True

    def _take_off(self, job: Job) -> None:
        """Free a job's adapter, and its reference's if no other job is held at it."""
        self.host.remove(job.name)
        others = [other.reference for other in self.jobs.values()]
        drop_reference(self.host, job.reference, others)

    def _report_step(self, job: Job, report: StepReport) -> None:
        self._reporter.step(job, report, self.seconds)
        save_steps = job.config.train.save_steps
        if save_steps is not None and report.step % save_steps == 0:
            self._saver.is_due = True

    def _announce_stop(self) -> None:
        self._reporter.message("saving everything after this step; Ctrl-C again stops at once")


def describe_base(host: Host) -> dict[str, Any]:
    """Say which base model it is and how it computes, for snapshots."""
    return {
        "name": host.base.name_or_path,
        "fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
    }


def _is_evaluation_due(job: Job) -> bool:
    position, eval_steps = job.position, job.config.train.eval_steps
    is_measured = bool(job.training_set.validation or job.config.eval)
    if not is_measured or not job.at_boundary or position.evaluated_step == position.step:
        return False
    is_milestone = job.is_complete or position.step in job.milestones
    return is_milestone or (eval_steps is not None and position.step % eval_steps == 0)
