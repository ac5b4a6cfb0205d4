"""The loop: jobs share rounds, are measured, saved, and leave when they are done."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from loraloom.errors import ConfigError, LoraloomError, TrainingError
from loraloom.models.host import Host
from loraloom.training.builder import JobBuilder
from loraloom.training.job import Job
from loraloom.training.progress import NOTICE, Interruption, Progress, Reporter
from loraloom.training.results import JobResult, Status
from loraloom.training.rounds import RoundRunner, Turn, check_fits, check_limit, choose_turns
from loraloom.training.step.batch import padding_share
from loraloom.training.step.fused import sum_gradients
from loraloom.training.step.objectives import drop_reference, load_reference
from loraloom.training.store import (
    Checkpoint,
    JobRecord,
    RunDirectory,
    describe_base,
)

CHECKPOINT_RETRY_S = 60.0

_log = logging.getLogger(__name__)


class Engine:
    """Jobs that share one base model and its forwards.

    Call `run`; or `step`, `evaluate`, `close` and `save_state` from your own loop. Jobs may join
    (`add`) and be ended (`stop`) before a run and between two of its rounds. A fault of one job
    ends that job with its reason and its last good weights; the others go on.

    Where the host has several ranks, each has an engine with the same jobs, and calls of one are
    made on all. The directory is the first one's to write.
    """

    def __init__(
        self,
        host: Host,
        jobs: Sequence[Job],
        builder: JobBuilder,
        directory: RunDirectory,
        progress: Progress,
        *,
        trackers: tuple[str, ...] = ("jsonl",),
        environment: Mapping[str, Any] | None = None,
        max_tokens_per_step: int | None = None,
        memory_limit: int | None = None,
        keep_snapshots: int = 2,
    ):
        self.host = host
        self.jobs: dict[str, Job] = {}  # those that train, by name
        self.round = 0  # rounds done
        self._records: dict[str, JobRecord] = {}  # of every job of the run, in their order
        self._unwritten: dict[str, dict[str, Any]] = {}  # states of jobs that couldn't be written
        self.builder = builder
        self._directory = directory
        self._environment = dict(environment or {})
        self._max_tokens = max_tokens_per_step
        self._memory_limit = memory_limit
        self._keep = keep_snapshots
        self._is_checkpoint_due = False
        self._no_checkpoint_before = 0.0
        self._reporter = Reporter(directory, progress, trackers)
        self.interruption = Interruption(partial(self._reporter.message, NOTICE))
        self._runner = RoundRunner(host, builder.pad_id, memory_limit, self._reporter.message)
        self._started_at = time.monotonic()
        for job in jobs:
            check_fits(job, max_tokens_per_step)
            self._enter(job)

    @property
    def results(self) -> dict[str, JobResult]:
        """What became of the jobs that are done, by name."""
        return {name: r.result for name, r in self._records.items() if r.result is not None}

    @property
    def joined(self) -> set[str]:
        return {name for name, record in self._records.items() if record.joined_later}

    @property
    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed one included."""
        return time.monotonic() - self._started_at

    def run(self, *between_steps: Callable[[Engine], None]) -> list[JobResult]:
        with self._reporter.showing(self.jobs.values()), self.interruption:
            is_ending = self._must_end()
            while not is_ending:
                self._evaluate_due()
                for job in [job for job in self.jobs.values() if job.is_complete]:
                    if self._has_sound_weights(job) and self.close(job).error is None:
                        directory = self._directory.job(job.name)
                        self._reporter.message(f"{job.name}: done, {directory}")
                for callback in between_steps:
                    callback(self)
                self.save_if_due(may_wait=bool(self.jobs))
                is_ending = self._must_end()
                if is_ending or not self.jobs:
                    break
                self._evaluate_due()  # of jobs that have just joined
                self.step()
                is_ending = self._must_end()
            if is_ending:
                try:
                    self.save_state()
                    self._reporter.message("saved; --resume goes on from here")
                except TrainingError as error:
                    self._reporter.message(f"error: {error}; --resume goes on from the one before")
                self.interruption.end()
        return list(self.results.values())

    def recall(self, name: str) -> bool:
        """Take over what became of a job that has ended on a worker that was lost since."""
        checkpoint = self._own_checkpoint(name)
        if checkpoint is None or checkpoint.jobs[name].result is None:
            return False
        self._records[name] = checkpoint.jobs[name]
        return True

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let a job join, from its own newest checkpoint where jobs have such."""
        ranks, checkpoint = self.host.ranks, self._own_checkpoint(job.name)
        try:
            # What fails on one rank, the first one's files for example, fails on all.
            with ranks.together():
                if job.name.casefold() in map(str.casefold, self._records):
                    raise ConfigError(f"job name must be new in this run, got {job.name!r} again")
                check_fits(job, self._max_tokens)
                check_limit(self.host, self._memory_limit)
                # Another job that was held at it may have gone with it since this one was built.
                load_reference(self.host, job.config.train.objective)
                if checkpoint is None:
                    self._directory.check_sources([job.config])
                    self._directory.prepare_job(job.name, overwrite=overwrite)
                else:
                    self._check_inputs(checkpoint, [job])
                    self._go_on(job, checkpoint)
        except Exception:
            self.discard(job)
            raise
        self._enter(job, joined_later=True)
        self._is_checkpoint_due = True
        try:
            with ranks.together():
                self._reporter.add(job)
        except Exception as error:
            self._fail(job, error)

    def stop(self, name: str, reason: str) -> JobResult:
        """End a job now. Its files are written as at its end, with the reason in result.json."""
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
        drop_reference(self.host, job.reference, [other.reference for other in self.jobs.values()])

    def step(self) -> None:
        """Do a round: jobs take their next micro-batch, and their step after the last one."""
        turns: list[Turn] = []
        for job in list(self.jobs.values()):
            try:
                turns.append((job, job.micro_batch()))
            except Exception as error:
                self._fail(job, error)
        if not turns:
            return
        turns = choose_turns(turns, self._max_tokens)
        # A matter of the whole forward; gradients are the same.
        self.host.enable_gradient_checkpointing(
            any(job.config.train.gradient_checkpointing for job, _ in turns)
        )
        outcomes = self._runner.run([micro_batch for _, micro_batch in turns])
        self.round += 1
        for (job, micro_batch), outcome in zip(turns, outcomes, strict=True):
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
                    self._is_checkpoint_due = True

    def evaluate(self, jobs: Sequence[Job]) -> None:
        """Measure jobs between two of their steps, and keep their weights if they are the best."""
        sound = [job for job in jobs if self._has_sound_weights(job)]
        outcomes = self.builder.measure_apart(sound)
        faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if faults and len(faults) == len(outcomes):
            self._runner.raise_if_general(faults[0])
        for job, outcome in zip(sound, outcomes, strict=True):
            try:
                with self.host.ranks.together():
                    if isinstance(outcome, Exception):
                        raise outcome
                    if job.take_evaluation(outcome):
                        try:
                            self._directory.write_best(self.host, job)
                        except (LoraloomError, OSError) as error:
                            self._reporter.message(
                                f"warning: job {job.name}: {error}; its best weights are kept, "
                                "they are written at its end"
                            )
            except Exception as error:
                self._fail(job, error)
                continue
            self._reporter.evaluation(job, outcome, self.seconds)
        self._is_checkpoint_due = True

    def close(
        self, job: Job, error: str | None = None, stop_reason: str | None = None
    ) -> JobResult:
        """Write a job's files and take its adapter off the host.

        A job whose files can't be written has failed; checkpoints still have a complete one.
        """
        name, result = job.name, self._result(job, error, stop_reason)
        try:
            self._directory.write_job(self.host, job, result)
        except Exception as fault:
            reason = f"its files can't be written: {_describe(fault)}"
            result = self._result(job, f"{error or f'job {name}'}: {reason}", stop_reason)
            self._reporter.message(f"error: {result.error}")
            if not self._directory.is_read_only:
                with suppress(OSError):
                    result.write(self._directory.job(name))
            if error is None and stop_reason is None:
                self._unwritten[name] = job.state_dict()
        job.release()
        del self.jobs[name]
        self._records[name] = replace(self._records[name], result=result)
        self.discard(job)
        self._reporter.end(name)
        self._is_checkpoint_due = True
        return result

    def save_state(self) -> None:
        """Write a checkpoint of all jobs; a TrainingError says that it can't be written."""
        for job in self.jobs.values():
            if not job.at_boundary:
                # Each rank has its own summand of a half-done step; the first one saves the sum.
                sum_gradients(self.host.ranks, [job.adapter])
                self.host.ranks.keep_at_first(job.adapter.parameters())
        # Before a job has begun, the seed says it all.
        states = {name: job.state_dict() for name, job in self.jobs.items() if job.has_begun}
        states |= self._unwritten
        journal, records = self._directory.sweep_journal, {}
        try:
            for name, record in self._records.items():
                records[name] = replace(
                    record,
                    metrics_bytes=self._reporter.metrics_bytes(name),
                    sha256=None,
                    scheduler_pass=self.jobs[name].scheduler_pass if name in self.jobs else 0.0,
                    result=None if name in self._unwritten else record.result,
                )
            journal_bytes = journal.stat().st_size if journal.exists() else 0
        except OSError as error:
            raise TrainingError(f"a checkpoint can't be written: {error}") from error
        base = describe_base(self.host)
        checkpoint = Checkpoint(self.round, self.seconds, base, records, journal_bytes)
        self._directory.write_checkpoint(checkpoint, states, keep=self._keep if states else 1)
        self._is_checkpoint_due = False

    def save_if_due(self, *, may_wait: bool) -> None:
        """Write a checkpoint if one is due. If that fails, the next try comes a minute later."""
        is_too_early = may_wait and time.monotonic() < self._no_checkpoint_before
        is_due = self.host.ranks.is_first and self._is_checkpoint_due and not is_too_early
        if not self.host.ranks.any(is_due):
            return
        try:
            self.save_state()
        except TrainingError as error:
            self._no_checkpoint_before = time.monotonic() + CHECKPOINT_RETRY_S
            self._reporter.message(
                f"warning: {error}; the one before is kept, the next try is in "
                f"{CHECKPOINT_RETRY_S:.0f} s"
            )

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint, also with the files; jobs that it doesn't know begin.

        Jobs that it calls done must not be on the host.
        """
        saved = checkpoint.jobs
        self._check_inputs(checkpoint, list(self.jobs.values()))
        self.round = checkpoint.round
        self._started_at = time.monotonic() - checkpoint.seconds
        passes = {name: r.scheduler_pass for name, r in saved.items() if r.result is None}
        for name, job in self.jobs.items():
            job.scheduler_pass = passes.get(name, min(passes.values(), default=0.0))
            if name in saved:
                self._go_on(job, checkpoint)
                joined_later = saved[name].joined_later
                self._records[name] = replace(self._records[name], joined_later=joined_later)
            else:
                self._directory.prepare_job(name)
        self._records = {**saved, **self._records}
        self._is_checkpoint_due = False

    def _own_checkpoint(self, name: str) -> Checkpoint | None:
        if not self._directory.by_job:
            return None
        return self._directory.newest_checkpoint([name])[0]

    def _check_inputs(self, checkpoint: Checkpoint, jobs: Sequence[Job]) -> None:
        changed = []
        for job in jobs:
            # Checkpoints of older versions have no hashes.
            saved = checkpoint.jobs[job.name].inputs if job.name in checkpoint.jobs else {}
            now = self.builder.input_digests(job)
            changed += [f"job {job.name}: {k}" for k, v in now.items() if saved.get(k, v) != v]
        if changed:
            raise ConfigError(
                "--resume needs the data that the run began with, it has changed: "
                f"{'; '.join(changed)}; put it back, or give --overwrite to begin again"
            )

    def _go_on(self, job: Job, checkpoint: Checkpoint) -> None:
        """Bring a job and its files to where a checkpoint has them."""
        try:
            state = checkpoint.load_state(job.name)
            if state is not None:
                job.load_state_dict(state)
                self.host.ranks.keep_at_first(job.parameters.values())
            self._directory.reopen(self.host, job, checkpoint.jobs[job.name].metrics_bytes)
        except LoraloomError as error:
            raise ConfigError(f"job {job.name}: {error}") from error
        except Exception as error:
            # Whatever comes of a state of something else.
            raise ConfigError(
                f"checkpoint {checkpoint.directory} can't be used, the state of job {job.name} is "
                f"of something else: {_describe(error)}; delete it to go on from the one before"
            ) from error

    def _must_end(self) -> bool:
        # Signals come to the ranks one after the other.
        return self.host.ranks.any(self.interruption.requested)

    def _evaluate_due(self) -> None:
        due = [job for job in self.jobs.values() if job.is_evaluation_due]
        if due:
            self.evaluate(due)

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
        position, best = job.position, job.selection
        status: Status = "finished" if position.step >= job.total_steps else "stopped early"
        status = "stopped" if stop_reason is not None else status
        last_metrics = position.metrics if position.evaluated_step == position.step else {}
        has_best = best.step is not None
        return JobResult(
            job=job.name,
            status=status if error is None else "failed",
            error=error,
            stop_reason=stop_reason,
            method=job.config.adapter.title,
            base_model=self.host.base.name_or_path,
            num_parameters=sum(parameter.numel() for parameter in job.parameters.values()),
            steps=position.step,
            epochs=round(job.order.epochs_after(position.step), 4),
            tokens=position.tokens,
            computed_tokens=position.computed_tokens,
            padding_share=round(padding_share(position.tokens, position.computed_tokens), 4),
            weights="best" if has_best else "last",
            metrics=best.metrics if has_best else last_metrics,
            best={k: getattr(best, k) for k in ("metric", "value", "step")} if has_best else None,
            last_metrics=last_metrics,
            data=job.training_set.report,
            seconds=round(self.seconds, 3),
            peak_memory_bytes=peak_memory_bytes(),
            environment=self._environment,
            directory=str(self._directory.job(job.name)),
            warnings=tuple(job.collapse.warnings.values()),
        )

    def _enter(self, job: Job, *, joined_later: bool = False) -> None:
        # Level with the one that is furthest behind.
        passes = [other.scheduler_pass for other in self.jobs.values()]
        job.scheduler_pass = min(passes, default=0.0)
        self.jobs[job.name] = job
        inputs = self.builder.input_digests(job)
        settings = job.config.model_dump(mode="json")
        self._records[job.name] = JobRecord(settings, joined_later=joined_later, inputs=inputs)


def _describe(error: Exception) -> str:
    """Say what an exception says, with its kind unless it is one of ours."""
    return str(error) if isinstance(error, LoraloomError) else f"{type(error).__name__}: {error}"


def peak_memory_bytes() -> dict[str, int]:
    """Return the high-water marks of this process's resident memory and of the accelerator's."""
    peak = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        peak["cuda"] = sum(map(torch.cuda.max_memory_allocated, devices))
    return peak
