"""Jobs that several workers train as one run.

A worker trains for a moment, tells the news and gets new orders. So whatever is decided is decided
here, between two of its rounds. To a sweep a cluster looks like an engine.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loraloom.config.job import JobConfig
from loraloom.config.run import RunConfig
from loraloom.errors import LoraloomError, TrainingError
from loraloom.training.cluster.board import MAX_LOSSES, Board, Size
from loraloom.training.cluster.crew import Crew, CrewLost, WorkerLostError
from loraloom.training.cluster.hiring import Hiring
from loraloom.training.cluster.remote_job import RemoteJob
from loraloom.training.cluster.rounds import Event, Rounds
from loraloom.training.cluster.staff import Answer, Staff
from loraloom.training.cluster.worker import Measured, News, Release, Start
from loraloom.training.run.checkpoint import JobRecord, Moment
from loraloom.training.run.interruption import Interruption
from loraloom.training.run.job import Position
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.results import JobResult, Status

if TYPE_CHECKING:
    from loraloom.training.run.sweep import Sweep

SLICE_S = 1.0
"""How long a worker trains before it tells the news."""
WAIT_S = 5.0
"""How long to wait for news before looking at what else is to be done."""


class Cluster:
    """Jobs, and the workers that train them.

    Attributes:
        jobs: Those that train or wait, by name.
        results: What became of the others.
    """

    def __init__(self, run: RunConfig, crew: Crew, directory: RunDirectory, progress: Progress):
        self.jobs: dict[str, RemoteJob] = {}
        self.results: dict[str, JobResult] = {}
        self._run = run
        self._directory = directory
        self._progress = progress
        self._board = Board(run.max_tokens_per_step)
        self._staff = Staff(crew)
        self._hiring = Hiring(self._staff, self._board, run.output_dir)
        self._rounds = Rounds()
        self._sweep: Sweep[RemoteJob] | None = None
        self._orders: dict[int, list[Start | Release]] = defaultdict(list)
        self._started_at = time.monotonic()
        self._last_loss = ""

    @property
    def base(self) -> dict[str, object]:
        """The base model, as snapshots say it."""
        return self._hiring.base

    @property
    def round(self) -> int:
        """The round of a sweep that was judged last."""
        return self._rounds.now

    @property
    def seconds(self) -> float:
        """Wall time of the training, earlier parts of a resumed one included."""
        return time.monotonic() - self._started_at

    def assemble(self, num_workers: int, seconds: float) -> None:
        """Start the workers; see `Hiring.assemble`."""
        self._hiring.assemble(num_workers, seconds, self._progress.message)

    def disband(self) -> None:
        """End all workers."""
        for worker in self._staff.numbers:
            self._staff.dismiss(worker)

    def go_on(self, results: dict[str, JobResult], seconds: float) -> None:
        """Take over what an earlier part of the run came to."""
        self.results = dict(results)
        self._started_at = time.monotonic() - seconds

    def hold_back(self, config: JobConfig, first_round: int, micro_batches: int) -> None:
        """Let a result that the sweep has not heard of wait until the others have come as far."""
        result = self.results.pop(config.name)
        measured = Measured(Size(0, 0, 0), result.steps, "", result.num_parameters, {}, result.data)
        job = RemoteJob(config, measured, first_round=first_round)
        self.jobs[config.name] = job
        position = Position(result.steps, micro_batches=micro_batches)
        self._rounds.note(config.name, Event(job.round_at(position), position, result))

    def build_all(self, configs: Sequence[JobConfig]) -> list[RemoteJob]:
        """Let workers build jobs and take them off again, to see that they can be."""
        built: list[RemoteJob] = []
        workers = list(self._board.rooms)
        for start in range(0, len(configs), len(workers)):
            some = list(zip(workers, configs[start : start + len(workers)], strict=False))
            for worker, config in some:
                self._staff.send(worker, "measure", config)
            built += [RemoteJob(config, self._staff.result(worker)) for worker, config in some]
        return built

    def build(self, config: JobConfig) -> RemoteJob:
        """Let a worker build a job while others train."""
        for _ in range(MAX_LOSSES):
            worker = self._free_worker()
            try:
                return RemoteJob(config, self._staff.ask(worker, "measure", config))
            except WorkerLostError as lost:
                self._lose(worker, str(lost))
        raise TrainingError(
            f"job {config.name}: {MAX_LOSSES} workers were lost that had to read it"
        )

    def add(self, job: RemoteJob, *, overwrite: bool = False) -> None:
        """Let a job wait for a worker. It goes on from its newest snapshot, if there is one."""
        store = self._directory.job_snapshots
        if not store.of(job.name).exists():
            self._directory.prepare_job(job.name, overwrite=overwrite)
            settings, inputs = job.config.model_dump(mode="json"), job.measured.inputs
            record = JobRecord(settings, joined_later=True, inputs=inputs)
            store.write(Moment(0, self.seconds, dict(self.base), {job.name: record}), {})
        job.first_round = self.round
        self.jobs[job.name] = job
        self._board.enter(job.name, job.measured.size, job.config.priority)

    def stop(self, name: str, reason: str) -> JobResult:
        """End a job now, as `Engine.stop` does.

        If its worker is lost meanwhile, the job comes to the same place again on another one.
        """
        job, worker = self.jobs[name], self._board.worker_of(name)
        if worker is not None:
            self._finish(worker)
        worker = self._board.worker_of(name)
        if worker is not None:
            try:
                self._take(worker, self._staff.ask(worker, "stop", name, reason))
            except WorkerLostError as lost:
                self._lose(worker, str(lost))
        event = self._rounds.events.pop(name, None)
        if event is not None and event.result is not None:
            self._reveal(job, event)
        return self.results.get(name) or self._made_up(job, "stopped", reason)

    def run(self, sweep: Sweep[RemoteJob] | None = None) -> list[JobResult]:
        """Train until all jobs are done."""
        self._sweep = sweep
        self._progress.start()
        notice = "saving everything after this step; Ctrl-C again stops at once"
        try:
            with Interruption(partial(self._progress.message, notice)) as interruption:
                self._ask_sweep()
                while self.jobs and not interruption.requested:
                    self._give_orders()
                    self._hear()
                    self._judge()
                if interruption.requested:
                    self._save()
                    interruption.end()
        finally:
            self._progress.stop()
        places = {job.name: place for place, job in enumerate(self._run.all_jobs)}
        in_order = sorted(self.results, key=lambda name: (places.get(name, len(places)), name))
        return [self.results[name] for name in in_order]

    @property
    def _waits_for_others(self) -> bool:
        """Whether jobs of the sweep wait for each other at evaluations."""
        return self._sweep is not None and self._sweep.decides

    def _is_in_step(self, name: str) -> bool:
        return self._waits_for_others and self._sweep is not None and self._sweep.owns(name)

    def _give_orders(self) -> None:
        """Give waiting jobs to workers, and let those train that have something to do."""
        for name, worker in self._board.place():
            job = self.jobs[name]
            order = Start(job.config, job.milestones, self._is_in_step(name))
            self._orders[worker].append(order)
        for worker in self._board.rooms:
            goes_on = any(name not in self._rounds.events for name in self._board.jobs_on(worker))
            if not self._staff.is_busy(worker) and (goes_on or worker in self._orders):
                orders = self._orders.pop(worker, [])
                self._staff.send(worker, "advance", orders, SLICE_S)

    def _hear(self) -> None:
        """Wait for news and take it in."""
        for answer in self._staff.answers(WAIT_S):
            self._receive(answer)
        if not self._board.rooms and not self._hiring.is_going_on:
            raise CrewLost(
                f"no worker is left, the last one was lost: {self._last_loss}; "
                "--resume goes on from the newest checkpoints"
            )

    def _receive(self, answer: Answer) -> None:
        if answer.worker not in self._board.rooms:
            fault = self._hiring.take(answer, self.seconds)
            if fault is not None:
                self._lose(answer.worker, fault)
        elif isinstance(answer.value, News):
            self._take(answer.worker, answer.value)
        else:
            self._lose(answer.worker, str(answer.value))

    def _finish(self, worker: int) -> None:
        """Wait until a worker has told the news of what it is at."""
        answer = self._staff.finish(worker)
        if answer is not None:
            self._receive(answer)

    def _take(self, worker: int, news: News) -> None:
        """Take in what has happened on a worker."""
        for name, position in news.began.items():
            self._begin(self.jobs[name], worker, position)
        for message in news.messages:
            self._progress.message(message)
        for name, reason in news.refused.items():
            self._refuse(name, reason)
        for name, position in news.positions.items():
            job = self.jobs.get(name)
            if job is not None:
                self._follow(job, position, news)

    def _begin(self, job: RemoteJob, worker: int, position: Position) -> None:
        self._board.began(job.name, position.step)
        self._rounds.forget(job.name)
        if self._is_in_step(job.name):  # what it measured there is seen in its turn, as an event
            seen = job.position
            position = replace(position, evaluated_step=seen.evaluated_step, metrics=seen.metrics)
        job.position = position
        if not job.is_shown:
            self._progress.add(job)
            job.is_shown = True
        self._progress.message(f"{job.name}: on worker {worker}, after step {position.step}")

    def _follow(self, job: RemoteJob, position: Position, news: News) -> None:
        result = news.results.get(job.name)
        if result is not None:
            self._board.leave(job.name)
        event = Event(job.round_at(position), position, result)
        if self._is_in_step(job.name) and (result is not None or job.name in news.standing):
            self._rounds.note(job.name, event)
        elif job.name not in self._rounds.events:
            self._reveal(job, event)

    def _reveal(self, job: RemoteJob, event: Event) -> None:
        """Let everybody see where a job stands."""
        job.position = event.position
        if job.is_shown:
            self._progress.update(job)
        if event.result is not None:
            self.results[job.name] = event.result
            del self.jobs[job.name]

    def _judge(self) -> None:
        """Let the sweep see what may be seen, and jobs go on that it leaves."""
        if not self._waits_for_others:
            return self._ask_sweep()
        while due := self._rounds.take(self._rounds_of_others()):
            for name, event in due.items():
                self._reveal(self.jobs[name], event)
            self._ask_sweep()
            for name in due.keys() & self.jobs.keys():
                worker = self._board.worker_of(name)
                if worker is not None:
                    self._orders[worker].append(Release(name, due[name].position.step))

    def _rounds_of_others(self) -> dict[str, int]:
        """The rounds of the sweep's jobs that train and stand at no event.

        Those that wait for room are not waited for, unless they have lost a worker and another is
        on its way.
        """
        return {
            name: job.round
            for name, job in self.jobs.items()
            if self._is_in_step(name) and name not in self._rounds.events
            if self._board.worker_of(name) is not None
            or (job.is_shown and self._hiring.is_going_on)
        }

    def _ask_sweep(self) -> None:
        if self._sweep is not None:
            self._sweep.between_steps(self)

    def _refuse(self, name: str, reason: str) -> None:
        """Let a job that didn't fit try it alone; one that was alone has failed."""
        if not self._board.refuse(name):
            self._give_up(name, reason)

    def _lose(self, worker: int, reason: str) -> None:
        """Let the jobs of a lost worker wait again, and start another one."""
        self._last_loss = reason
        self._staff.dismiss(worker)
        self._orders.pop(worker, None)
        names = self._board.jobs_on(worker)
        was_ready = worker in self._board.rooms
        given_up = self._board.lose(worker) if was_ready else []
        for name in names:
            self._rounds.forget(name)
        jobs = f"; its jobs go on elsewhere: {', '.join(names)}" if names else ""
        self._progress.message(f"warning: worker {worker} was lost: {reason}{jobs}")
        for name in given_up:
            self._give_up(name, f"{MAX_LOSSES} workers were lost that trained it: {reason}")
        if not self._hiring.replace(was_ready=was_ready):
            self._progress.message("warning: workers die before they are ready; none is replaced")

    def _give_up(self, name: str, reason: str) -> None:
        """End a job that no worker can train; its snapshots stay as they are."""
        job = self.jobs[name]
        self._board.leave(name)
        result = self._made_up(job, "failed", f"job {name}: {reason}")
        self._progress.message(f"error: {result.error}")
        with suppress(OSError):
            self._directory.write_result(name, result)
        event = Event(job.round, job.position, result)
        if self._is_in_step(name):
            self._rounds.note(name, event)
        else:
            self._reveal(job, event)

    def _made_up(self, job: RemoteJob, status: Status, reason: str) -> JobResult:
        return job.result(
            status,
            base_model=self._run.base_model,
            directory=str(self._directory.job(job.name)),
            seconds=self.seconds,
            reason=reason,
        )

    def _free_worker(self) -> int:
        """Find a worker that is at nothing; if there is none, wait for one."""
        while True:
            free = [worker for worker in self._board.rooms if not self._staff.is_busy(worker)]
            if free:
                return free[0]
            self._hear()

    def _save(self) -> None:
        """Let all workers write snapshots, as nothing more will be done."""
        for worker in list(self._board.rooms):
            self._finish(worker)
        for worker in self._board.rooms:
            self._staff.send(worker, "save")
        faults = [
            answer.value
            for worker in self._board.rooms
            if (answer := self._staff.finish(worker)) is not None
            if isinstance(answer.value, LoraloomError | WorkerLostError)
        ]
        for fault in faults:
            self._progress.message(f"error: {fault}; --resume goes on from the one before")
        if not faults:
            self._progress.message("saved; --resume goes on from here")
