"""The loop: jobs share rounds, are measured, saved, and leave when they are done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from loraloom.errors import ConfigError, LoraloomError, TrainingError
from loraloom.models.host import Host
from loraloom.training.checkpoint import STATE_ERRORS, JobRecord, Moment, Snapshot
from loraloom.training.checks import check_inputs, check_sources, input_digests
from loraloom.training.evaluation import Evaluation
from loraloom.training.fitting import RoundRunner, Schedule
from loraloom.training.interruption import NOTICE, Interruption
from loraloom.training.job import Job
from loraloom.training.memory import check_limit
from loraloom.training.outputs import RunDirectory
from loraloom.training.progress import Progress, Reporter
from loraloom.training.results import JobResult, job_result, parse_result
from loraloom.training.step.batch import MicroBatch
from loraloom.training.step.fused import sum_gradients
from loraloom.training.step.objectives import drop_reference, load_reference

SNAPSHOT_RETRY_S = 60.0

_log = logging.getLogger(__name__)


class Engine:
    """Jobs that share one base model and its forwards.

    Call `run`; or `step`, `evaluate`, `close` and `save_state` from a loop of one's own. Jobs may
    join (`add`) and be ended (`stop`) before a run and between two of its rounds.

    A fault of one job ends that job with its reason and its last good weights; the others go on.

    Gradient checkpointing is a matter of the whole forward: it is on if any job in it asks for it.
    Gradients are the same.

    Where the host has several ranks, each has an engine with the same jobs, and calls of one are
    made on all. The directory is the first one's to write.

    Attributes:
        jobs: Those that train, by name.
        round: Rounds done.
    """

    def __init__(
        self,
        host: Host,
        jobs: Sequence[Job],
        evaluation: Evaluation,
        directory: RunDirectory,
        progress: Progress,
        *,
        trackers: tuple[str, ...] = ("jsonl",),
        environment: Mapping[str, Any] | None = None,
        max_tokens_per_step: int | None = None,
        memory_limit: int | None = None,
        keep_snapshots: int = 2,
        seconds: float = 0.0,
    ):
        self.host = host
        self.jobs: dict[str, Job] = {}
        self.round = 0
        self._records: dict[str, JobRecord] = {}  # of every job of the run, in their order
        self._results: dict[str, JobResult] = {}
        self._unwritten: dict[str, dict[str, Any]] = {}  # states of jobs that couldn't be written
        self._schedule = Schedule(max_tokens_per_step)
        self._memory_limit = memory_limit
        self._keep_snapshots = keep_snapshots
        self._is_snapshot_due = False
        self._no_snapshot_before = 0.0
        self._interruption: Interruption | None = None
        self._evaluation = evaluation
        self._directory = directory
        self._environment = dict(environment or {})
        self._reporter = Reporter(directory, progress, trackers)
        self._runner = RoundRunner(host, evaluation.pad_id, memory_limit, self._reporter.message)
        self._started_at = time.monotonic() - seconds
        for job in jobs:
            self._schedule.check_fits(job)
            self._enter(job)

    @property
    def results(self) -> dict[str, JobResult]:
        """What became of the jobs that are done, by name."""
        return {name: self._results[name] for name in self._records if name in self._results}

    @property
    def joined(self) -> set[str]:
        """Names of the jobs that joined a run that had begun."""
        return {name for name, record in self._records.items() if record.joined_later}

    @property
    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed one included."""
        return time.monotonic() - self._started_at

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C or SIGTERM came: the run ends after what is being done."""
        return self._interruption is not None and self._interruption.requested

    def run(self, *between_steps: Callable[[Engine], None]) -> list[JobResult]:
        """Train until all jobs are done."""
        interruption = Interruption(partial(self._reporter.message, NOTICE))
        with self.reporting(), interruption as self._interruption:
            while not (is_ending := self._must_end()):
                has_jobs = self.settle(*between_steps)
                if (is_ending := self._must_end()) or not has_jobs:
                    break
                self._evaluate_due()  # of jobs that have just joined
                self.step()
            if is_ending:
                self._save_for_later()
                self._interruption.end()
        return list(self.results.values())

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Show the jobs and log their metrics, within this context."""
        self._reporter.start(self.jobs.values())
        try:
            yield
        finally:
            self._interruption = None
            self._reporter.stop()

    def settle(self, *between_steps: Callable[[Engine], None]) -> bool:
        """Do what is due between two rounds: evaluations, endings, callbacks, a snapshot."""
        self._evaluate_due()
        self._close_complete()
        for callback in between_steps:
            callback(self)
        self.save_if_due(may_wait=bool(self.jobs))
        return bool(self.jobs)

    def interrupt(self) -> None:
        """End the run after what is being done, as Ctrl-C does; from another thread."""
        if self._interruption is not None:
            self._interruption.requested = True

    def recall(self, name: str) -> bool:
        """Take over what became of a job that has ended on a worker that was lost since."""
        snapshot = self._directory.newest_snapshot([name])[0] if self._directory.by_job else None
        if snapshot is None or (record := snapshot.jobs[name]).result is None:
            return False
        self._records[name] = record
        self._results[name] = parse_result(record.result)
        return True

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let a job join. It takes part from the next round on, and snapshots have it."""
        snapshot = (
            self._directory.newest_snapshot([job.name])[0] if self._directory.by_job else None
        )
        if snapshot is not None:
            return self.resume(job, snapshot)
        with self._joining(job):
            check_sources([job.config], self._directory)
            self._directory.prepare_job(job.name, overwrite=overwrite)

    def resume(self, job: Job, snapshot: Snapshot) -> None:
        """Let a job join that goes on from a snapshot, whichever engine has made that."""
        record = snapshot.jobs[job.name]
        with self._joining(job):
            inputs = input_digests(self.host, job, self._evaluation)
            check_inputs({job.name: record.inputs}, {job.name: inputs})
            self._directory.tidy(job.name)
            with _refusing_other_states(job.name, snapshot):
                self._go_on(job, snapshot)
            self._directory.cut_metrics(job.name, record.metrics_bytes)

    @contextmanager
    def _joining(self, job: Job) -> Iterator[None]:
        """Let a job join after what is done in this context; take it off where that fails.

        What fails on one rank, the first one's files for example, fails on all.
        """
        ranks = self.host.ranks
        try:
            with ranks.together():
                if job.name.casefold() in map(str.casefold, self._records):
                    raise ConfigError(f"job name must be new in this run, got {job.name!r} again")
                self._schedule.check_fits(job)
                check_limit(self.host, self._memory_limit)
                load_reference(self.host, job.config.train.objective)  # another job's may have gone
                yield
        except Exception:
            self.discard(job)
            raise
        self._enter(job)
        self._records[job.name] = replace(self._records[job.name], joined_later=True)
        self._is_snapshot_due = True
        try:
            with ranks.together():
                self._reporter.add(job)
        except Exception as error:
            self._fail(job, error)

    def stop(self, name: str, reason: str) -> JobResult:
        """End a job now. Its files are written as at its end, with the reason in result.json.

        The micro-batches of a half-done step are of no use then. Weights that are not finite make
        it a failed job.
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

    def discard(self, job: Job) -> None:
        """Free the adapter of a job that doesn't train, and its reference's if nobody needs it."""
        self.host.remove(job.name)
        others = [other.reference for other in self.jobs.values()]
        drop_reference(self.host, job.reference, others)

    def step(self) -> None:
        """Do a round: jobs take their next micro-batch, and their step where it was the last one.

        All jobs take part, or as many as max_tokens_per_step has room for.
        """
        micro_batches = self._schedule.choose(self._micro_batches())
        if not micro_batches:
            return
        jobs = [self.jobs[micro_batch.adapter.name] for micro_batch in micro_batches]
        self.host.enable_gradient_checkpointing(
            any(job.config.train.gradient_checkpointing for job in jobs)
        )
        outcomes = self._runner.run(micro_batches)
        self.round += 1
        self._schedule.charge(micro_batches)
        for job, micro_batch, outcome in zip(jobs, micro_batches, outcomes, strict=True):
            try:
                with self.host.ranks.together():
                    report = job.accept(micro_batch, outcome)
            except Exception as error:
                self._fail(job, error)
                continue
            if report is not None:
                self._reporter.step(job, report, self.seconds)
                save_steps = job.config.train.save_steps
                if save_steps is not None and report.step % save_steps == 0:
                    self._is_snapshot_due = True

    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Measure jobs between two of their steps, and keep their weights if they are the best."""
        sound = [job for job in jobs if self._has_sound_weights(job)]
        outcomes = self._evaluation.measure_apart(sound)
        faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if faults and len(faults) == len(outcomes):
            self._runner.raise_if_general(faults[0])
        for job, outcome in zip(sound, outcomes, strict=True):
            try:
                with self.host.ranks.together():
                    metrics = self._take_evaluation(job, outcome)
            except Exception as error:
                self._fail(job, error)
                continue
            self._reporter.evaluation(job, metrics, self.seconds)
        self._is_snapshot_due = True

    def close(
        self, job: Job, error: str | None = None, stop_reason: str | None = None
    ) -> JobResult:
        """Write a job's files and take its adapter off the host.

        A job whose files can't be written has failed. If it was complete, snapshots keep what a
        later process needs to write them.
        """
        result = self._result(job, error, stop_reason)
        try:
            self._directory.write_job(self.host, job, result)
        except Exception as fault:
            reason = f"its files can't be written: {_describe(fault)}"
            result = self._result(job, f"{error or f'job {job.name}'}: {reason}", stop_reason)
            self._reporter.message(f"error: {result.error}")
            with suppress(OSError):
                self._directory.write_result(job.name, result)
            if error is None and stop_reason is None:
                self._unwritten[job.name] = job.state_dict()
        self._leave(job, result)
        return result

    def save_state(self) -> None:
        """Write a snapshot of all jobs."""
        try:
            self._write_snapshot()
        except OSError as error:
            raise TrainingError(f"a checkpoint can't be written: {error}") from error
        self._is_snapshot_due = False

    def _write_snapshot(self) -> None:
        for job in self.jobs.values():
            if not job.at_boundary:
                weights = list(job.parameters.values())
                sum_gradients(self.host.ranks, [weights])
                self.host.ranks.keep_at_first(weights)
        running = {
            name: job.state_dict()
            for name, job in self.jobs.items()
            if job.has_begun  # before, the seed says it all
        }
        states, journal = self._unwritten | running, self._directory.sweep_journal
        moment = Moment(
            self.round,
            self.seconds,
            describe_base(self.host),
            {name: self._record(name) for name in self._records},
            sweep_bytes=journal.stat().st_size if journal.exists() else 0,
        )
        keep = self._keep_snapshots if states else 1
        self._directory.write_snapshot(moment, states, keep=keep)

    def save_if_due(self, *, may_wait: bool) -> None:
        """Write a snapshot where one is due. If that fails, the next try comes a minute later."""
        is_too_early = may_wait and time.monotonic() < self._no_snapshot_before
        if not self.host.ranks.first(self._is_snapshot_due and not is_too_early):
            return
        try:
            self.save_state()
        except TrainingError as error:
            self._no_snapshot_before = time.monotonic() + SNAPSHOT_RETRY_S
            self._reporter.message(
                f"warning: {error}; the one before is kept, the next try is in "
                f"{SNAPSHOT_RETRY_S:.0f} s"
            )

    def load_state(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; jobs that it doesn't know begin.

        Jobs that it calls done must not be on the host. Settings may differ in what changes no
        result. Files of jobs that go on are brought back to where the snapshot is.
        """
        saved = snapshot.jobs
        inputs = {name: record.inputs for name, record in self._records.items()}
        check_inputs({name: record.inputs for name, record in saved.items()}, inputs)
        self.round = snapshot.round
        self._started_at = time.monotonic() - snapshot.seconds
        for name in self.jobs.keys() - saved.keys():
            self._directory.check_new(name)
        for name, record in saved.items():
            self._directory.tidy(name)
            with _refusing_other_states(name, snapshot):
                if record.result is None:
                    self._go_on(self.jobs[name], snapshot)
                else:
                    self._results[name] = parse_result(record.result)
        for name, own in self._records.items():
            if name in saved:
                self._records[name] = replace(own, joined_later=saved[name].joined_later)
        self._records = {**saved, **self._records}
        self._schedule.restore(
            {name: one.scheduler_pass for name, one in saved.items() if one.result is None}
        )
        for name in self.jobs:
            self._directory.cut_metrics(name, saved[name].metrics_bytes if name in saved else 0)
        self._is_snapshot_due = False

    def _go_on(self, job: Job, snapshot: Snapshot) -> None:
        """Bring a job and its files to where a snapshot has them."""
        state = snapshot.load_state(job.name)
        if state is not None:
            job.load_state_dict(state)
            self.host.ranks.keep_at_first(job.parameters.values())
        self._directory.reopen(self.host, job)

    def _must_end(self) -> bool:
        """Whether any rank was interrupted; signals come to them one after the other."""
        return self.host.ranks.any(self.is_interrupted)

    def _micro_batches(self) -> list[MicroBatch]:
        """Return each job's next micro-batch; a job that has none to give ends."""
        micro_batches = []
        for job in list(self.jobs.values()):
            try:
                micro_batches.append(job.micro_batch())
            except Exception as error:
                self._fail(job, error)
        return micro_batches

    def _take_evaluation(self, job: Job, outcome: dict[str, float] | Exception) -> dict[str, float]:
        """Give a job what was measured; its weights are kept and written if they are the best."""
        if isinstance(outcome, Exception):
            raise outcome
        if job.take_evaluation(outcome):
            job.keep_best()
            try:
                self._directory.write_best(self.host, job)
            except (LoraloomError, OSError) as error:
                self._reporter.message(
                    f"warning: job {job.name}: {error}; its best weights are kept, they are "
                    "written at its end"
                )
        return outcome

    def _evaluate_due(self) -> None:
        due = [job for job in self.jobs.values() if job.is_evaluation_due]
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
            reason = f"job {job.name}, after step {job.position.step}: {_describe(error)}"
        if not isinstance(error, LoraloomError | OSError):
            _log.error("job %s failed", job.name, exc_info=error)
        self._reporter.message(f"error: {reason}")
        job.restore_proven_weights()
        self.close(job, error=reason)

    def _result(self, job: Job, error: str | None, stop_reason: str | None) -> JobResult:
        return job_result(
            job,
            self.host.base,
            self._directory.job(job.name),
            error=error,
            stop_reason=stop_reason,
            seconds=self.seconds,
            environment=self._environment,
        )

    def _record(self, name: str) -> JobRecord:
        """Return what a snapshot says of a job."""
        result = None if name in self._unwritten else self._results.get(name)
        return replace(
            self._records[name],
            metrics_bytes=self._reporter.metrics_bytes(name),
            sha256=None,
            scheduler_pass=self._schedule.passes.get(name, 0.0),
            result=None if result is None else asdict(result),
        )

    def _enter(self, job: Job) -> None:
        self.jobs[job.name] = job
        inputs = input_digests(self.host, job, self._evaluation)
        self._records[job.name] = JobRecord(job.config.model_dump(mode="json"), inputs=inputs)
        self._schedule.enter(job)

    def _leave(self, job: Job, result: JobResult) -> None:
        job.release()
        del self.jobs[job.name]
        self._results[job.name] = result
        self._schedule.leave(job.name)
        self.discard(job)
        self._reporter.end(job.name)
        self._is_snapshot_due = True

    def _save_for_later(self) -> None:
        """Write a snapshot at the end of a run that was interrupted."""
        try:
            self.save_state()
            self._reporter.message("saved; --resume goes on from here")
        except TrainingError as error:
            self._reporter.message(f"error: {error}; --resume goes on from the one before")


@contextmanager
def _refusing_other_states(name: str, snapshot: Snapshot) -> Iterator[None]:
    """Raise a ConfigError where a job's state turns out to be of something else."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"job {name}: {error}") from error
    except STATE_ERRORS as error:
        raise ConfigError(
            f"checkpoint {snapshot.directory} can't be used, the state of job {name} is of "
            f"something else: {_describe(error)}; delete it to go on from the one before"
        ) from error


def describe_base(host: Host) -> dict[str, Any]:
    """Say which base model it is and how it computes, for snapshots."""
    return {
        "name": host.base.name_or_path,
        "fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "quantization": host.base.quantization,
    }


def _describe(error: Exception) -> str:
    """Say what an exception says, with its kind unless it is one of ours."""
    return str(error) if isinstance(error, LoraloomError) else f"{type(error).__name__}: {error}"
