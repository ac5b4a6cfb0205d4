"""Many jobs on many devices: each worker of a Ray cluster trains a share of a run's jobs.

A worker is an actor with a base model and an engine of its own. Each job has its own snapshots, so
when a worker is lost, Ray starts it again, and its jobs go on from theirs. A sweep's study is a
file that all workers share: each takes the next combination when it has room.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from loraloom.durable import staging
from loraloom.errors import ConfigError, LoraloomError, TrainingError
from loraloom.training.job import Position
from loraloom.training.progress import NOTICE, Interruption, Progress
from loraloom.training.ray_cluster import (
    RESTARTS,
    check_worker_device,
    choose_workers,
    connected,
    first_line,
)
from loraloom.training.results import JobResult
from loraloom.training.settings import JobConfig, RunConfig
from loraloom.training.setup import Setup, check_run, load_base, set_up
from loraloom.training.store import RunDirectory, nearest_existing

# How often the user is told of workers that start or load the base model.
TELL_S = 20.0
NEWS_S = 1.0


class _Calls(Progress):
    """Keeps what is said to the user, as calls for the progress of the command's own process."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    @override
    def message(self, text: str) -> None:
        self.calls.append(("message", text))

    @override
    def add(self, name: str, total_steps: int, position: Position) -> None:
        self.calls.append(("add", name, total_steps, replace(position)))

    @override
    def update(self, name: str, total_steps: int, position: Position) -> None:
        self.calls.append(("update", name, total_steps, replace(position)))

    @override
    def rank(self, *_: Any, **__: Any) -> None:
        pass


@dataclass
class Worker:
    """Trains some jobs of a run in a process of Ray's. Errors that are ours are returned.

    Args:
        run: The whole run.
        jobs: The worker's share of its jobs; of a sweep's it takes one after the other.
        place: The worker's number, and how many there are.
        directory: Where the command was given.
        command: What result.json says the run was started with.
    """

    run: RunConfig
    jobs: Sequence[JobConfig]
    place: tuple[int, int]
    directory: Path
    command: str

    def __post_init__(self) -> None:
        self._progress = _Calls()
        self._setup: Setup | None = None
        os.chdir(self.directory)

    # `mark` is made by the driver in output_dir: a machine that doesn't see it has other storage.
    def prepare(self, mark: Path | None, resume: bool) -> LoraloomError | None:
        """Load the base model and build the jobs, to see what is wrong with them."""
        if mark is not None and not mark.exists():
            return ConfigError(
                f"output_dir must be on storage that all workers see, {self.run.output_dir} is "
                f"not seen on {socket.gethostname()}; name a directory on a shared file system"
            )
        directory = RunDirectory(self.run.output_dir, by_job=True)
        try:
            base = load_base(self.run, self.run.device)
            self._setup = set_up(
                *(self.run, self.jobs, base, directory, self._progress, self.command),
                resume=resume,
            )
        except LoraloomError as error:
            return error
        return None

    def train(self) -> list[JobResult] | LoraloomError:
        """Train the jobs to their end, or until `interrupt`."""
        if self._setup is None:  # Ray has started this worker again
            self._progress.message(
                f"warning: worker {self.place[0]} was lost; its jobs go on from their checkpoints"
            )
            if (fault := self.prepare(None, resume=True)) is not None:
                return fault
        assert self._setup is not None
        try:
            self._setup.begin()
            if self.run.sweep is None:
                return self._setup.engine.run()
            sweep = self._setup.sweep(self.place)
            sweep.open()
            return self._setup.engine.run(sweep.between_steps)
        except LoraloomError as error:
            return error
        except KeyboardInterrupt:  # everything is saved
            return []

    def news(self) -> list[tuple[Any, ...]]:
        """Say what has happened since the last time, after a moment."""
        # The driver asks again at once: without a pause, both would do nothing else.
        time.sleep(NEWS_S)
        calls, self._progress.calls = self._progress.calls, []
        return calls

    def interrupt(self) -> None:
        """Let the training end, with everything saved."""
        if self._setup is not None:
            self._setup.engine.interruption.requested = True


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
        jobs = [job for job in run.all_jobs if run.sweep is None or not run.sweep.owns(job.name)]
        size = min(size, len(jobs)) if run.sweep is None else size
        actor = ray.remote(Worker).options(
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            max_concurrency=2,  # it trains, and tells the news
            scheduling_strategy="SPREAD",
            **resources,
        )
        progress.message(f"starting {size} workers")
        shares = [(jobs[number::size], (number, size)) for number in range(size)]
        workers = [actor.remote(run, *share, Path.cwd(), command) for share in shares]
        _prepare(ray, workers, directory, progress, goes_on=goes_on)
        with directory.lock():
            if not goes_on:
                directory.check(resume=resume, overwrite=overwrite)
                directory.prepare([job.name for job in run.all_jobs])
            return _train(ray, workers, run, directory, progress)


def _prepare(
    ray: Any, workers: Sequence[Any], directory: RunDirectory, progress: Progress, *, goes_on: bool
) -> None:
    """Let workers load the base model and build their jobs, before anything is written."""
    with staging(nearest_existing(directory.path)) as mark:
        calls = [worker.prepare.remote(mark.absolute(), goes_on) for worker in workers]
        began_at, waiting = time.monotonic(), calls
        while waiting:
            done, waiting = ray.wait(calls, num_returns=len(calls), timeout=TELL_S)
            if waiting:
                passed = f"{time.monotonic() - began_at:.0f} s"
                progress.message(f"waiting for worker {len(done) + 1} of {len(calls)} ({passed})")
        for number, call in enumerate(calls):
            try:
                fault = ray.get(call)
            except ray.exceptions.RayError as error:
                fault = TrainingError(f"worker {number} was lost: {first_line(error)}")
            if fault is not None:
                raise fault


def _train(
    ray: Any,
    workers: Sequence[Any],
    run: RunConfig,
    directory: RunDirectory,
    progress: Progress,
) -> list[JobResult]:
    """Train until all jobs are done; the jobs of a worker that is lost for good are left."""
    sweep: Any = None
    if run.sweep is not None:
        from loraloom.training.sweep import Sweep  # it needs Optuna

        sweep = Sweep(run, directory, progress)
        sweep.open()
    training = {worker.train.remote(): worker for worker in workers}
    news = {worker.news.remote(): worker for worker in workers}
    results: dict[str, JobResult] = {}
    shown: set[str] = set()
    lost: list[str] = []
    is_ending = False

    def show(calls: Sequence[tuple[Any, ...]]) -> None:
        for method, *values in calls:
            if method == "add" and values[0] in shown:  # by a worker that was started again
                method = "update"
            shown.update(values[:1] if method == "add" else [])
            getattr(progress, method)(*values)

    def end(worker: Any, call: Any) -> None:
        try:
            outcome = ray.get(call)
        except ray.exceptions.RayError as error:
            lost.append(first_line(error))
            progress.message(f"warning: a worker was lost for good: {lost[-1]}")
            return
        with suppress(ray.exceptions.RayError):  # its last words; the outcome is here
            show(ray.get(worker.news.remote()))
        ray.kill(worker, no_restart=True)
        if isinstance(outcome, LoraloomError):
            raise outcome
        results.update({result.job: result for result in outcome})

    progress.start()
    try:
        with Interruption(lambda: progress.message(NOTICE)) as interruption:
            while training:
                if interruption.requested and not is_ending:
                    is_ending = True
                    for worker in training.values():
                        worker.interrupt.remote()
                for call in ray.wait([*training, *news], num_returns=1, timeout=NEWS_S)[0]:
                    if call in training:
                        end(training.pop(call), call)
                    elif (worker := news.pop(call)) in training.values():
                        with suppress(ray.exceptions.RayError):  # its training fails as well
                            show(ray.get(call))
                        news[worker.news.remote()] = worker
                if sweep is not None:
                    sweep.show()
            if is_ending:
                interruption.end()
    finally:
        progress.stop()
    if sweep is not None:
        sweep.show(is_over=True)
    if lost:
        raise TrainingError(
            f"{len(lost)} of {len(workers)} workers were lost {RESTARTS + 1} times: {lost[0]}; "
            "the other jobs are done, give --resume to go on with theirs"
        )
    places = {job.name: place for place, job in enumerate(run.all_jobs)}
    in_order = sorted(results, key=lambda name: (places.get(name, len(places)), name))
    return [results[name] for name in in_order]
