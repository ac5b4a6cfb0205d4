"""Many jobs on many devices: each worker of a Ray cluster trains a share of a run's jobs.

A worker is an actor with a base model and an engine of its own. Each job has its own snapshots, so
when a worker is lost, Ray starts it again, and its jobs go on from theirs. A sweep's study is a
file that all workers share: each takes the next combination when it has room.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from loraloom.durable import staging
from loraloom.errors import ConfigError, LoraloomError, TrainingError
from loraloom.training.engine import Engine
from loraloom.training.job import Position
from loraloom.training.progress import NOTICE, Interruption, Progress
from loraloom.training.ranking import Ranking
from loraloom.training.ray_cluster import (
    check_worker_device,
    choose_workers,
    connected,
    first_line,
)
from loraloom.training.results import JobResult
from loraloom.training.run import Setup, check_run, load_base, set_up
from loraloom.training.settings import JobConfig, RunConfig
from loraloom.training.store import RunDirectory, nearest_existing

RESTARTS = 2
"""How often a lost worker is started again, by Ray itself."""
START_S = 600.0
"""How long workers may take to start, as the cluster may be busy with something else."""
TELL_S = 20.0
"""How often the user is told of workers that start or load the base model."""
NEWS_S = 1.0


class Notes(Progress):
    """Keeps what is said to the user until it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    @override
    def message(self, text: str) -> None:
        self.messages.append(text)

    @override
    def update(self, name: str, total_steps: int, position: Position) -> None:
        pass

    @override
    def rank(self, ranking: Ranking) -> None:
        pass


@dataclass(frozen=True)
class News:
    """What a worker says of itself: its process, messages for the user, and its jobs' places."""

    process: tuple[str, int]
    messages: Sequence[str]
    jobs: dict[str, tuple[int, Position]]


class Worker:
    """Trains some jobs of a run in a process of Ray's. Errors that are ours are returned."""

    def __init__(
        self,
        run: RunConfig,
        jobs: Sequence[JobConfig],
        place: tuple[int, int] | None,
        directory: Path,
        command: str,
    ):
        self._run = run
        self._jobs = jobs
        self._place = place
        self._command = command
        self._notes = Notes()
        self._setup: Setup | None = None
        os.chdir(directory)

    def prepare(self, mark: Path, resume: bool) -> LoraloomError | None:
        """Load the base model and build the jobs, to see what is wrong with them."""
        if not mark.exists():
            return ConfigError(
                f"output_dir must be on storage that all workers see, {self._run.output_dir} is "
                f"not seen on {socket.gethostname()}; name a directory on a shared file system"
            )
        try:
            self._setup = self._set_up(resume=resume)
        except LoraloomError as error:
            return error
        return None

    def train(self) -> list[JobResult] | LoraloomError:
        """Train the jobs to their end, or until `interrupt`."""
        try:
            if self._setup is None:  # it was started again
                self._setup = self._set_up(resume=True)
            setup, callbacks = self._setup, list[Callable[[Engine], None]]()
            setup.begin()
            if self._place is not None and self._run.sweep is not None:
                sweep = setup.sweep(self._place)
                sweep.study.open()
                callbacks.append(setup.lead.between_steps(sweep.between_steps))
            return setup.engine.run(*callbacks)
        except LoraloomError as error:
            return error
        except KeyboardInterrupt:  # everything is saved
            return []

    def news(self) -> News:
        """Say what has happened since the last time, after a moment."""
        time.sleep(NEWS_S)
        messages, self._notes.messages = self._notes.messages, []
        jobs = [] if self._setup is None else list(self._setup.engine.jobs.values())
        places = {job.name: (job.total_steps, replace(job.position)) for job in jobs}
        return News((socket.gethostname(), os.getpid()), messages, places)

    def interrupt(self) -> None:
        """Let the training end, with everything saved."""
        if self._setup is not None:
            self._setup.engine.interrupt()

    def _set_up(self, *, resume: bool) -> Setup:
        base = load_base(self._run, self._run.device)
        directory = RunDirectory(self._run.output_dir, by_job=True)
        return set_up(
            self._run, self._jobs, base, directory, self._notes, self._command, resume=resume
        )


@dataclass(eq=False)
class _Share:
    """A worker as the driver sees it: its jobs, and the calls that are on the way."""

    number: int
    actor: Any
    jobs: Sequence[JobConfig]
    place: tuple[int, int] | None
    call: Any = None
    news: Any = None
    process: tuple[str, int] | None = None


def train_with_ray(
    run: RunConfig,
    address: str,
    num_workers: int | None,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    command: str,
) -> list[JobResult]:
    """Train a run's jobs on the workers of a Ray cluster; see `train`."""
    check_worker_device(run.device)
    if run.parallel.base != "replicated":
        raise ConfigError(
            "parallel.base: fsdp needs torchrun, got --ray, whose workers have a base model each"
        )
    directory = RunDirectory(run.output_dir, by_job=True)
    check_run(run, directory, resume=resume, overwrite=overwrite)
    goes_on = resume and directory.has_checkpoints()
    progress.message("starting Ray" if address == "auto" else f"connecting to Ray at {address}")
    with connected(address) as ray:
        size, resources = choose_workers(ray.nodes(), run.device, num_workers)
        driver = _Driver(ray, run, directory, progress, resources, command)
        driver.assemble(size, goes_on=goes_on)
        with directory.lock():
            if not goes_on:
                directory.check(resume=resume, overwrite=overwrite)
                directory.prepare([job.name for job in run.all_jobs])
            return driver.train()


class _Driver:
    """Starts workers, shows how they get on, and deals with those that are lost for good."""

    def __init__(
        self,
        ray: Any,
        run: RunConfig,
        directory: RunDirectory,
        progress: Progress,
        resources: dict[str, int],
        command: str,
    ):
        self._ray = ray
        self._run = run
        self._directory = directory
        self._progress = progress
        self._command = command
        self._actor = ray.remote(Worker).options(
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            max_concurrency=2,  # it trains, and tells the news
            scheduling_strategy="SPREAD",
            **resources,
        )
        self._shares: list[_Share] = []
        self._num_workers = 0
        self._shown: set[str] = set()
        self._results: dict[str, JobResult] = {}
        self._study: Any = None
        self._began_at = time.monotonic()
        if run.sweep is not None:
            from loraloom.training.sweep import SweepStudy

            self._study = SweepStudy(run, directory, progress)

    def assemble(self, size: int, *, goes_on: bool) -> None:
        """Start the workers, each with a share of the jobs, and let them build these."""
        owns = (lambda _: False) if self._run.sweep is None else self._run.sweep.owns
        jobs = [job for job in self._run.all_jobs if not owns(job.name)]
        if self._run.sweep is None:
            size = min(size, len(jobs))
        self._progress.message(f"starting {size} workers")
        for number in range(size):
            self._start(jobs[number::size], (number, size))
        with staging(nearest_existing(self._run.output_dir)) as mark:
            calls = [share.actor.prepare.remote(mark.absolute(), goes_on) for share in self._shares]
            self._wait_for(calls)
            for share, call in zip(self._shares, calls, strict=True):
                try:
                    fault = self._ray.get(call)
                except self._ray.exceptions.RayError as error:
                    fault = TrainingError(f"worker {share.number} was lost: {first_line(error)}")
                if fault is not None:
                    raise fault

    def train(self) -> list[JobResult]:
        """Train until all jobs are done."""
        if self._study is not None:
            self._study.open()
        for share in self._shares:
            self._begin(share)
        self._progress.start()
        try:
            with Interruption(lambda: self._progress.message(NOTICE)) as interruption:
                is_ending = False
                while self._shares:
                    if interruption.requested and not is_ending:
                        is_ending = True
                        for share in self._shares:
                            share.actor.interrupt.remote()
                    self._hear(is_ending=is_ending)
                if is_ending:
                    interruption.end()
        finally:
            self._progress.stop()
        if self._study is not None:
            self._study.show(is_over=True)
        places = {job.name: place for place, job in enumerate(self._run.all_jobs)}
        in_order = sorted(self._results, key=lambda name: (places.get(name, len(places)), name))
        return [self._results[name] for name in in_order]

    def _start(self, jobs: Sequence[JobConfig], place: tuple[int, int] | None) -> _Share:
        actor = self._actor.remote(self._run, jobs, place, Path.cwd(), self._command)
        share = _Share(self._num_workers, actor, jobs, place)
        self._num_workers += 1
        self._shares.append(share)
        return share

    def _begin(self, share: _Share) -> None:
        share.call, share.news = share.actor.train.remote(), share.actor.news.remote()

    def _wait_for(self, calls: Sequence[Any]) -> None:
        """Wait until workers have started and loaded the base model, and tell the user."""
        began_at = time.monotonic()
        while True:
            done, waiting = self._ray.wait(calls, num_returns=len(calls), timeout=TELL_S)
            passed_s = time.monotonic() - began_at
            if not waiting:
                return
            self._progress.message(
                f"waiting for worker {len(done) + 1} of {len(calls)} ({passed_s:.0f} s)"
            )
            if passed_s > START_S and not done:
                raise ConfigError(
                    f"{len(calls)} workers must find room on the cluster, none did within "
                    f"{START_S:.0f} s; give a lower --ray-workers, or wait until others are done"
                )

    def _hear(self, *, is_ending: bool) -> None:
        """Wait for what the workers say, and take it in."""
        calls = [call for share in self._shares for call in (share.call, share.news)]
        done, _ = self._ray.wait(calls, num_returns=1, timeout=NEWS_S)
        for share in [*self._shares]:
            if share.news in done:
                self._take_news(share)
                share.news = share.actor.news.remote()
            if share.call in done:
                self._end(share, is_ending=is_ending)
        if self._study is not None:
            self._study.show()

    def _take_news(self, share: _Share) -> None:
        try:
            news: News = self._ray.get(share.news)
        except self._ray.exceptions.RayError:  # its call fails as well
            return
        if share.process not in (None, news.process):
            self._progress.message(
                f"warning: worker {share.number} was lost; its jobs go on from their snapshots"
            )
        share.process = news.process
        for message in news.messages:
            self._progress.message(message)
        for name, (total_steps, position) in news.jobs.items():
            if name in self._shown:
                self._progress.update(name, total_steps, position)
            else:
                self._progress.add(name, total_steps, position)
                self._shown.add(name)

    def _end(self, share: _Share, *, is_ending: bool) -> None:
        """Take what a worker's training came to, and dismiss the worker."""
        self._shares.remove(share)
        try:
            results = self._ray.get(share.call)
        except self._ray.exceptions.RayError as error:
            self._lose(share, first_line(error), is_ending=is_ending)
            return
        self._take_news(share)
        self._ray.kill(share.actor, no_restart=True)
        if isinstance(results, LoraloomError):
            raise results
        self._results |= {result.job: result for result in results}

    def _lose(self, share: _Share, reason: str, *, is_ending: bool) -> None:
        """Let the jobs of a worker that is lost for good go on apart; one that was alone failed.

        Whose fault it is can't be told where several share a worker.
        """
        self._ray.kill(share.actor, no_restart=True)
        self._progress.message(f"warning: worker {share.number} was lost for good: {reason}")
        left = []
        for config in share.jobs:
            checkpoint, _ = self._directory.newest_checkpoint([config.name])
            result = None if checkpoint is None else checkpoint.jobs[config.name].result
            if result is not None:
                self._results[config.name] = result
            else:
                left.append(config)
        if share.place is None or len(left) == 1:
            for config in left:
                self._give_up(config, reason)
            left = []
        if self._study is not None and share.place is not None:
            self._give_trials_up(share.place, reason)
        if is_ending:
            return
        for config in left:
            self._begin(self._start([config], None))
        if self._study is not None and share.place is not None:
            self._begin(self._start([], share.place))

    def _give_trials_up(self, place: tuple[int, int], reason: str) -> None:
        number, size = place
        for trial, name in self._study.begun():
            is_own = trial.user_attrs.get("worker", 0) % size == number
            if is_own and not trial.state.is_finished() and name not in self._results:
                self._study.give_up(trial)
                self._give_up(self._run.trial(trial.number, trial.params).job, reason)

    def _give_up(self, config: JobConfig, reason: str) -> None:
        """End a job that no worker can train; its snapshots stay as they are."""
        result = JobResult(
            job=config.name,
            status="failed",
            error=f"job {config.name}: {RESTARTS + 1} workers were lost that trained it: {reason}",
            method=config.adapter.title,
            base_model=self._run.base_model,
            num_parameters=0,
            steps=0,
            epochs=0.0,
            tokens=0,
            computed_tokens=0,
            padding_share=0.0,
            weights="last",
            metrics={},
            best=None,
            last_metrics={},
            data=(),
            seconds=round(time.monotonic() - self._began_at, 3),
            peak_memory_bytes={},
            environment={},
            directory=str(self._directory.job(config.name)),
        )
        self._progress.message(f"error: {result.error}")
        with suppress(OSError):  # the table and the exit code say it too
            self._directory.job(config.name).mkdir(parents=True, exist_ok=True)
            self._directory.write_result(config.name, result)
        self._results[config.name] = result
