"""A worker: an engine that takes orders, trains for a moment, and tells the news."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraloom.config.job import JobConfig
from loraloom.config.run import RunConfig
from loraloom.errors import LoraloomError, TrainingError, shown
from loraloom.models.attach import attach
from loraloom.models.loading import load_base_model
from loraloom.training.cluster.board import Size
from loraloom.training.run.builder import JobBuilder
from loraloom.training.run.engine import Engine, describe_base
from loraloom.training.run.evaluation import Evaluation
from loraloom.training.run.fitting import RoundRunner
from loraloom.training.run.inputs import input_digests
from loraloom.training.run.job import Job, JobView, Position
from loraloom.training.run.memory import (
    adapter_bytes,
    available_bytes,
    base_bytes,
    check_memory,
    predict_memory,
)
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.results import JobResult, describe_environment, parse_result
from loraloom.training.run.schedule import Schedule
from loraloom.training.step.optimizers import check_optimizer_device


@dataclass(frozen=True)
class Start:
    """An order to train a job, from its newest snapshot where there is one.

    Args:
        config: The job's settings.
        milestones: Steps after which it is evaluated as well.
        waits: After each evaluation it waits until it is released.
    """

    config: JobConfig
    milestones: frozenset[int] = frozenset()
    waits: bool = False


@dataclass(frozen=True)
class Release:
    """An order to let a job go on after an evaluation.

    Args:
        name: Of the job.
        step: Of the evaluation.
    """

    name: str
    step: int


@dataclass(frozen=True)
class Loaded:
    """What a worker says of itself once it has a base model.

    Args:
        base: The base model and how it computes.
        machine: Name of the worker's machine.
        free_bytes: What the device has beside the base model; None where nobody can tell.
        is_on_cpu: Whether workers of one machine share that.
    """

    base: dict[str, Any]
    machine: str
    free_bytes: int | None
    is_on_cpu: bool


@dataclass(frozen=True)
class Measured:
    """What a worker says of a job that it has built and taken off again.

    Args:
        size: Its memory.
        total_steps: Of the job.
        held_out: Hash of the examples that it is measured on.
        num_parameters: Weights that it trains.
        inputs: Hashes of what it learns from and is measured on; see `input_digests`.
        report: Lines about its data.
    """

    size: Size
    total_steps: int
    held_out: str
    num_parameters: int
    inputs: dict[str, str]
    report: tuple[str, ...]


@dataclass(frozen=True)
class News:
    """What has happened on a worker since it told the last time.

    Args:
        positions: Where its jobs stand, those that have ended included.
        began: Where jobs have begun.
        standing: Jobs that stand at an evaluation and wait for their release.
        results: What became of jobs that have ended.
        refused: Why jobs could not begin.
        messages: For the user.
    """

    positions: dict[str, Position] = field(default_factory=dict)
    began: dict[str, Position] = field(default_factory=dict)
    standing: frozenset[str] = frozenset()
    results: dict[str, JobResult] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    messages: tuple[str, ...] = ()


class Notes:
    """Keeps what is said to the user until it is told."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def start(self) -> None:
        """Nothing is shown here."""

    def add(self, job: JobView) -> None:
        """Nothing is shown here."""

    def update(self, job: JobView) -> None:
        """Nothing is shown here."""

    def message(self, text: str) -> None:
        """Keep a message."""
        self._messages.append(text)

    def stop(self) -> None:
        """Nothing is shown here."""

    def take(self) -> tuple[str, ...]:
        """Return the messages, and keep them no longer."""
        messages, self._messages = tuple(self._messages), []
        return messages


class Worker:
    """Trains jobs on one device.

    Call `see`, `load`, `open`; then the others.
    """

    def __init__(self, run: RunConfig, place: Path, command: str):
        self._run = run
        self._place = place
        self._command = command
        self._notes = Notes()
        self._directory = RunDirectory(run.output_dir, by_job=True)
        self._open = ExitStack()
        self._waiting: dict[str, int | None] = {}  # jobs that wait: the step that is released
        self._positions: dict[str, Position] = {}
        self._began: dict[str, Position] = {}
        self._refused: dict[str, str] = {}
        self._untold: dict[str, JobResult] = {}  # of jobs that ended on a worker that was lost

    def see(self, mark: Path) -> str | None:
        """Go to the run's directory, and name the machine if it doesn't see a file there."""
        try:
            os.chdir(self._place)
            return None if mark.exists() else socket.gethostname()
        except OSError:
            return socket.gethostname()

    def load(self) -> Loaded:
        """Load the base model."""
        run = self._run
        model, tokenizer = load_base_model(
            run.base_model, run.dtype, run.device, run.attn_implementation, run.quantization
        )
        self._host = attach(model)
        self._evaluation = Evaluation(self._host, tokenizer)
        self._builder = JobBuilder(self._host, tokenizer, self._evaluation)
        return Loaded(
            describe_base(self._host),
            socket.gethostname(),
            available_bytes(self._host.device),
            self._host.device.type == "cpu",
        )

    def open(self, free_bytes: int | None, seconds: float) -> int | None:
        """Be ready for jobs."""
        run, host = self._run, self._host
        held = base_bytes(host)
        self._limit = run.memory_limit
        if self._limit is None and free_bytes is not None:
            self._limit = free_bytes + held
        self._engine = Engine(
            host,
            [],
            self._evaluation,
            self._directory,
            self._notes,
            trackers=run.trackers,
            environment=describe_environment(host.device, host.dtype, self._command),
            max_tokens_per_step=run.max_tokens_per_step,
            memory_limit=self._limit,
            keep_snapshots=run.keep_snapshots,
            seconds=seconds,
        )
        self._open.enter_context(self._engine.reporting())
        return None if self._limit is None else self._limit - held

    def measure(self, config: JobConfig) -> Measured:
        """Build a job, to see that it can be, and take it off again."""
        check_optimizer_device(config.train, self._host.device, config.name)
        before = adapter_bytes(self._host)
        try:
            job = self._builder.build(config)
            try:
                return self._measure(job, before)
            finally:
                self._engine.discard(job)
        except LoraloomError:
            raise
        except Exception as error:  # of memory, or of a library that makes initial weights
            RoundRunner(self._host, self._evaluation.pad_id).raise_if_general(error)
            reason = f"{type(error).__name__}: {shown(str(error))}"
            raise TrainingError(f"job {config.name}: {reason}") from error

    def advance(self, orders: Sequence[Start | Release], seconds: float) -> News:
        """Obey orders, and train for about so long, or until no job may go on."""
        for order in orders:
            self._obey(order)
        ends_at = time.monotonic() + seconds
        while self._settle():
            self._engine.step()
            if time.monotonic() >= ends_at:
                self._settle()
                break
        return self._news()

    def stop(self, name: str, reason: str) -> News:
        """End a job now; see `Engine.stop`."""
        self._engine.stop(name, reason)
        self._engine.save_if_due(may_wait=True)
        return self._news()

    def save(self) -> None:
        """Write snapshots of all jobs."""
        self._engine.save_state()
        self._open.close()

    def _measure(self, job: Job, before: int) -> Measured:
        """Measure a job on a host that had so many bytes of adapters before."""
        bound = self._run.max_tokens_per_step
        Schedule(bound).check_fits(job)
        prediction = predict_memory(self._host, [job], bound)
        limit = None if self._limit is None else self._limit + before
        check_memory(prediction, limit, self._host.device)
        size = Size(
            prediction.adapters - before + prediction.learning,
            prediction.activations + prediction.loss,
            prediction.rows * prediction.length,
        )
        report = (*job.training_set.report, *job.training_set.warnings)
        inputs = input_digests(self._host, job, self._evaluation)
        count = sum(parameter.numel() for parameter in job.parameters.values())
        return Measured(size, job.total_steps, job.held_out, count, inputs, report)

    def _obey(self, order: Start | Release) -> None:
        if isinstance(order, Release):
            if order.name in self._waiting:
                self._waiting[order.name] = order.step
            return
        try:
            self._start(order)
        except Exception as error:
            reason = str(error)
            if not isinstance(error, LoraloomError):
                reason = f"{type(error).__name__}: {shown(reason)}"
            self._refused[order.config.name] = reason

    def _start(self, order: Start) -> None:
        """Begin with a job; of one whose worker died before it could tell its end, tell that."""
        name = order.config.name
        snapshot, faults = self._directory.job_snapshots.of(name).newest()
        for fault in faults:
            self._notes.message(fault)
        if snapshot is not None and (record := snapshot.jobs[name]).result is not None:
            result = parse_result(record.result)
            self._untold[name] = result
            self._positions[name] = Position(result.steps, micro_batches=record.micro_batches)
            return
        job = self._builder.build(order.config)
        job.milestones = order.milestones
        if snapshot is None:
            self._engine.add(job, overwrite=True)
        else:
            self._engine.resume(job, snapshot)
        self._positions[job.name] = job.position
        self._began[job.name] = replace(job.position)
        if order.waits:
            self._waiting[job.name] = None

    def _settle(self) -> bool:
        """Do what is due between two rounds, and tell whether any job may go on."""
        self._engine.settle()
        jobs = self._engine.jobs
        self._engine.held = {name for name in self._waiting if name in jobs and self._stands(name)}
        return len(self._engine.held) < len(jobs)

    def _stands(self, name: str) -> bool:
        """Whether a job stands at an evaluation from which it is not released."""
        job = self._engine.jobs[name]
        step = job.position.step
        return job.at_boundary and job.position.evaluated_step == step != self._waiting[name]

    def _news(self) -> News:
        results = self._untold | self._engine.results
        ended = self._positions.keys() & results.keys()
        news = News(
            {name: replace(position) for name, position in self._positions.items()},
            self._began,
            frozenset(self._engine.held - ended),
            {name: results[name] for name in ended},
            self._refused,
            self._notes.take(),
        )
        self._began, self._refused = {}, {}
        for name in ended:
            del self._positions[name]
            self._waiting.pop(name, None)
        return news
