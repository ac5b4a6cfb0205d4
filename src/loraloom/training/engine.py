"""The loop: jobs share rounds, are measured, saved, and leave when they are done.

`set_up` starts one, here or in a worker.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from loraloom.config.fields import checked
from loraloom.devices import peak_memory_bytes
from loraloom.errors import ConfigError, LoraloomError, TrainingError, plain
from loraloom.host.host import Host
from loraloom.training import checkpoints
from loraloom.training.builder import Base, JobBuilder, naming
from loraloom.training.job import Job, JobResult, Status
from loraloom.training.memory import kept_memory
from loraloom.training.reporting import Interruption, Progress, Reporter, check_trackers
from loraloom.training.rounds import RoundRunner, Turn, choose_turns
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import JobConfig, RunConfig, TrackerName
from loraloom.training.step import batch, fused, objectives, optimizers

_log = logging.getLogger(__name__)


class Engine:
    """Jobs that share one base model; they may join (`add`) and be ended (`stop`) between rounds.

    A fault of one job ends that job, with its last good weights. Each rank has an engine with the
    same jobs, and calls of one are made on all; the directory is the first one's to write.
    """

    def __init__(
        self,
        host: Host,
        jobs: Sequence[Job],
        builder: JobBuilder,
        directory: RunDirectory,
        progress: Progress,
        run: RunConfig,
        environment: Mapping[str, Any] | None = None,
    ):
        self.host = host
        self.jobs: dict[str, Job] = {}  # those that train, by name
        self.round = 0  # rounds done
        # Of every job of the run, in their order.
        self._records: dict[str, checkpoints.JobRecord] = {}
        self.builder = builder
        self.directory = directory
        self._environment = dict(environment or {})
        self._run = run
        self._is_checkpoint_due = False
        # Where several ranks train, the first one has files and speaks.
        self._is_first = host.ranks.is_first
        trackers: list[TrackerName] = ["jsonl", *run.trackers] if self._is_first else []
        check_trackers(trackers, len(jobs))
        self._reporter = Reporter(directory, progress, trackers)
        self.interruption = Interruption(self._reporter.message)
        self._runner = RoundRunner(host, builder.pad_id, run.memory_limit, self._reporter.message)
        self._started_at = time.monotonic()
        for job in jobs:
            self._enter(job)

    @property
    def results(self) -> dict[str, JobResult]:
        results = {name: record.result for name, record in self._records.items()}
        return {name: result for name, result in results.items() if result is not None}

    @property
    def joined(self) -> set[str]:
        return {name for name, record in self._records.items() if record.joined_later}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started_at  # earlier parts of a resumed run included

    def run(self, *between_steps: Callable[[Engine], None]) -> list[JobResult]:
        with self._reporter.showing(self.jobs.values()), self.interruption:
            while not self._must_end():
                self._evaluate_due()
                for job in [job for job in self.jobs.values() if job.is_complete]:
                    if self._has_sound_weights(job):
                        self.close(job)
                        self._reporter.message(f"{job.name}: done, {self.directory.job(job.name)}")
                for callback in between_steps:
                    callback(self)
                self.save_if_due()
                if not self.jobs or self._must_end():
                    break
                self._evaluate_due()  # of jobs that have just joined
                self.step()
            if self._must_end():
                for job in self.jobs.values():
                    self._write_intermediate_adapter(job)
                self.save_state()
                self._reporter.message("saved a checkpoint; pass --resume to continue from here")
                self.interruption.end()
        return list(self.results.values())

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let a job join."""
        try:
            # What fails on one rank, the first one's files for example, fails on all.
            with self.host.ranks.together():
                if job.name.casefold() in {name.casefold() for name in self._records}:
                    raise ConfigError(f"job name must be new in this run, got {job.name!r} again")
                # Another job with the same reference may have ended since this job was built.
                objectives.load_reference(self.host, job.config.train.objective)
                if self._is_first:
                    self.directory.check_sources([job.config], self.jobs)
                    self.directory.prepare_job(job.name, overwrite=overwrite)
        except Exception:
            self.discard(job)
            raise
        job.position.level = self._least_level(self.jobs)
        self._enter(job, joined_later=True)
        self._is_checkpoint_due = True
        self._reporter.add(job)

    def _least_level(self, names: Iterable[str]) -> float:
        return min((self.jobs[name].position.level for name in names), default=0.0)

    def stop(self, name: str, reason: str) -> JobResult:
        job = self.jobs.get(name)
        if job is not None and self._has_sound_weights(job):
            self.close(job, stop_reason=reason)
            self._reporter.message(f"{name}: stopped after step {job.position.step}: {reason}")
        if name not in self.results:
            raise ConfigError(f"{name!r} must be the name of a job of this run")
        return self.results[name]

    def discard(self, job: Job) -> None:
        """Free the adapter of a job that doesn't train, and its reference's if nobody needs it."""
        self.host.remove(job.name)
        needed = [training.reference for training in self.jobs.values()]
        objectives.drop_reference(self.host, job.reference, needed)

    def step(self) -> None:
        turns: list[Turn] = []
        for job in list(self.jobs.values()):
            with self._failing_alone(job):
                turns.append((job, job.micro_batch()))
        if not turns:
            return
        turns = choose_turns(turns, self._run.max_tokens_per_step)
        # A matter of the whole forward; gradients are the same.
        self.host.enable_gradient_checkpointing(
            any(job.config.train.gradient_checkpointing for job, _ in turns)
        )
        outcomes = self._runner.run([micro_batch for _, micro_batch in turns])
        self.round += 1
        for (job, micro_batch), outcome in zip(turns, outcomes, strict=True):
            metrics = None
            with self._failing_alone(job):
                metrics = job.accept(micro_batch, outcome)
            if metrics is not None:
                self._reporter.step(job, metrics, self.seconds)
                save_steps = job.config.train.save_steps
                if save_steps is not None and job.position.step % save_steps == 0:
                    self._write_intermediate_adapter(job)
                    self._is_checkpoint_due = True
        self._reporter.flush()

    def _evaluate_due(self) -> None:
        due = [job for job in self.jobs.values() if job.is_evaluation_due]
        sound = [job for job in due if self._has_sound_weights(job)]
        if not sound:
            return
        outcomes = self.builder.measure_apart(sound)
        faults = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if faults and len(faults) == len(outcomes):
            self._runner.raise_if_general(faults[0])
        for job, outcome in zip(sound, outcomes, strict=True):
            with self._failing_alone(job):
                if isinstance(outcome, Exception):
                    raise outcome
                job.take_evaluation(outcome)
                self._reporter.evaluation(job, outcome, self.seconds)
            if job.name in self.jobs and job.has_new_best and not job.is_complete:
                self._write_intermediate_adapter(job)
        self._reporter.flush()
        self._is_checkpoint_due = True

    def close(
        self, job: Job, error: str | None = None, stop_reason: str | None = None
    ) -> JobResult:
        name = job.name
        result = self._result(job, error, stop_reason)
        with self.host.ranks.together():
            if self._is_first:
                self.directory.write_job(self.host, job, result)
                self.directory.rotate_intermediate_adapters(job, has_ended=True)
        job.release()
        del self.jobs[name]
        self._records[name] = replace(self._records[name], result=result)
        self.discard(job)
        self._reporter.end(name)
        self._is_checkpoint_due = True
        return result

    def _write_intermediate_adapter(self, job: Job) -> None:
        """Write a job's adapter for its users, before the checkpoint that resumes after it."""
        # Weights that no loss has proven yet may be infinite: the next step says so.
        if job.position.step == 0 or job.find_fault_of_weights() is not None:
            return
        with self.host.ranks.together():
            if self._is_first:
                self.directory.write_intermediate_adapter(self.host, job)

    def save_state(self) -> None:
        for job in self.jobs.values():
            if not job.at_boundary:
                # Each rank has its own summand of a half-done step; the first one saves the sum.
                fused.sum_gradient(self.host.ranks, job.adapter)
                self.host.ranks.keep_at_first(job.adapter.parameters())
        # Before a job has begun, the seed says it all.
        begun = [job for job in self.jobs.values() if job.position.has_begun]
        states = {job.name: job.state_dict() for job in begun}
        with self.host.ranks.together():
            if self._is_first:
                keep = self._run.keep_snapshots if states else 1
                self.directory.checkpoints.write(self._checkpoint(), states, keep=keep)
                for job in self.jobs.values():
                    self.directory.rotate_intermediate_adapters(job)
        self._is_checkpoint_due = False

    def _checkpoint(self) -> checkpoints.Checkpoint:
        records = {}
        for name, record in self._records.items():
            metrics_bytes = self._reporter.metrics_bytes(name)
            records[name] = replace(record, metrics_bytes=metrics_bytes, sha256=None)
        journal = self.directory.sweep_journal
        return checkpoints.Checkpoint(
            round=self.round,
            seconds=self.seconds,
            base=checkpoints.describe_base(self.host),
            jobs=records,
            sweep_bytes=journal.stat().st_size if journal.exists() else 0,
            max_tokens=self._runner.max_tokens,
            max_alone=self._runner.max_alone,
        )

    def save_if_due(self) -> None:
        if self._is_checkpoint_due:
            self.save_state()

    def begin(self, checkpoint: checkpoints.Checkpoint | None) -> None:
        """Resume from a checkpoint, whose done jobs are not on the host, or write the first."""
        if checkpoint is None:
            return self.save_state()
        self._reporter.message(f"resuming after {checkpoint.round} steps")
        saved = checkpoint.jobs
        self._check_inputs(checkpoint)
        self.round = checkpoint.round
        self._runner.max_tokens = checkpoint.max_tokens
        self._runner.max_alone = checkpoint.max_alone
        self._started_at = time.monotonic() - checkpoint.seconds
        for name, job in self.jobs.items():
            if name in saved:
                self._resume(job, checkpoint)
                joined_later = saved[name].joined_later
                self._records[name] = replace(self._records[name], joined_later=joined_later)
            elif self._is_first:
                self.directory.prepare_job(name)
        for name in self.jobs.keys() - saved.keys():
            self.jobs[name].position.level = self._least_level(self.jobs.keys() & saved.keys())
        self._records = {**saved, **self._records}
        # Jobs that are new in the run file are in a checkpoint before they write files.
        self._is_checkpoint_due = not self.jobs.keys() <= saved.keys()

    def _check_inputs(self, checkpoint: checkpoints.Checkpoint) -> None:
        changed = []
        for job in self.jobs.values():
            saved = checkpoint.jobs[job.name].inputs if job.name in checkpoint.jobs else {}
            for name, digest in job.inputs.items():
                if saved.get(name, digest) != digest:
                    changed.append(f"job {job.name}: {name}")
        if changed:
            raise ConfigError(
                "--resume requires the data of the interrupted run, which has changed: "
                f"{'; '.join(changed)}; restore the data, or pass --overwrite to start again"
            )

    def _resume(self, job: Job, checkpoint: checkpoints.Checkpoint) -> None:
        with naming(job.config):
            state = checkpoint.load_state(job.name)
            if state is not None:
                job.load_state_dict(state)
                self.host.ranks.keep_at_first(job.learner.parameters.values())
            if self._is_first:
                self.directory.reopen(job.name, checkpoint.jobs[job.name].metrics_bytes)
                self.directory.rotate_intermediate_adapters(job)

    def _must_end(self) -> bool:
        # Signals come to the ranks one after the other.
        return self.host.ranks.any(self.interruption.requested)

    def _has_sound_weights(self, job: Job) -> bool:
        fault = job.find_fault_of_weights()
        if fault is None:
            return True
        self._fail(job, fault)
        return False

    @contextmanager
    def _failing_alone(self, job: Job) -> Iterator[None]:
        """End a job by what it raises; what fails on one rank fails on all."""
        try:
            with self.host.ranks.together():
                yield
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        reason = str(error)
        if not isinstance(error, TrainingError):
            kind = "" if isinstance(error, LoraloomError) else f"{type(error).__name__}: "
            reason = f"job {job.name}, after step {job.position.step}: {kind}{error}"
        if not isinstance(error, LoraloomError | OSError):
            _log.error("job %s failed", job.name, exc_info=error)
        self._reporter.message(f"error: {reason}")
        if isinstance(error, TrainingError):
            job.restore_proven_weights()
        else:  # which says nothing about the last step
            job.release()
        self.close(job, error=reason)

    def _result(self, job: Job, error: str | None, stop_reason: str | None) -> JobResult:
        position = job.position
        selection = job.selection
        status: Status = "finished" if position.step >= job.total_steps else "stopped early"
        if error is not None:
            status = "failed"
        elif stop_reason is not None:
            status = "stopped"
        last_metrics = position.metrics if position.evaluated_step == position.step else {}
        best = None
        if selection.step is not None:
            best = {name: getattr(selection, name) for name in ("metric", "value", "step")}
        return JobResult(
            job=job.name,
            status=status,
            error=error and plain(error),
            stop_reason=stop_reason and plain(stop_reason),
            method=job.config.adapter.title,
            base_model=self.host.base.name_or_path,
            num_parameters=optimizers.count_trained(job.config.train, job.adapter),
            steps=position.step,
            epochs=round(job.order.epochs_after(position.step), 4),
            tokens=position.tokens,
            computed_tokens=position.computed_tokens,
            padding_share=round(batch.padding_share(position.tokens, position.computed_tokens), 4),
            weights="last" if best is None else "best",
            metrics=last_metrics if best is None else selection.metrics,
            best=best,
            last_metrics=last_metrics,
            data=job.training_set.report,
            seconds=round(self.seconds, 3),
            peak_memory_bytes=peak_memory_bytes(),
            environment=self._environment,
            directory=str(self.directory.job(job.name)),
            warnings=tuple(job.collapse.warnings),
        )

    def _enter(self, job: Job, *, joined_later: bool = False) -> None:
        self.jobs[job.name] = job
        settings = job.config.model_dump(mode="json")
        record = checkpoints.JobRecord(settings, joined_later=joined_later, inputs=job.inputs)
        self._records[job.name] = record


def set_up(
    run: RunConfig,
    configs: Sequence[JobConfig],
    base: Base,
    directory: RunDirectory,
    progress: Progress,
    command: str,
    *,
    resume: bool,
) -> tuple[Engine, checkpoints.Checkpoint | None]:
    """Build a run's jobs, those that had joined it too, and give the checkpoint to begin from."""
    host, tokenizer = base
    builder = JobBuilder(host, tokenizer)
    checkpoint = None
    saved: dict[str, checkpoints.JobRecord] = {}
    lines: list[str] = []
    if resume:
        checkpoint, lines = directory.checkpoints.newest()
        if checkpoint is not None:
            described = checkpoints.describe_base(host, checkpoint.base)
            checkpoints.check_same_run(checkpoint, run.all_jobs, described)
            saved = checkpoint.jobs
        elif lines:
            raise ConfigError("\n".join([*lines, "--resume requires an undamaged checkpoint"]))
    in_file = {config.name for config in run.all_jobs}
    for name in [name for name in saved if name not in in_file and not saved[name].joined_later]:
        del saved[name]
        lines.append(
            f"warning: job {name} is no longer in the run file and is left out; put it "
            "back to go on with it, before its checkpoints are replaced"
        )
    jobs = [builder.build(config, reread=False) for config in _unfinished(configs, saved)]
    environment = _describe_environment(host, command)
    engine = Engine(host, jobs, builder, directory, progress, run, environment)
    for job in jobs:
        lines += [f"{job.name}: {line}" for line in job.training_set.report]
        lines.append(f"{job.name}: {kept_memory(job.config, job.adapter)}")
    for line in lines:
        progress.message(line)
    return engine, checkpoint


def _unfinished(
    configs: Sequence[JobConfig], saved: Mapping[str, checkpoints.JobRecord]
) -> list[JobConfig]:
    unfinished = {config.name: config for config in configs}
    for name, record in saved.items():
        if record.result is not None:
            unfinished.pop(name, None)
        elif name not in unfinished:
            settings = checkpoints.as_of_now(record.settings)
            unfinished[name] = checked(JobConfig, settings, origin=f"--resume: job {name}: ")
    return list(unfinished.values())


def _describe_environment(host: Host, command: str) -> dict[str, Any]:
    packages = ("loraloom", "torch", "transformers", "safetensors")
    versions = {package: version(package) for package in packages}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "device": str(host.device),
        "dtype": str(host.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": host.ranks.size,
        "command": plain(command),  # manifests with half a surrogate pair can't be read
    }
