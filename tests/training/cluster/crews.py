"""A crew of workers in this process, which can be killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraloom.config.run import RunConfig
from loraloom.errors import LoraloomError
from loraloom.training.cluster.crew import Crew, WorkerLostError
from loraloom.training.cluster.train import train_with
from loraloom.training.cluster.worker import Start, Worker
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.results import JobResult
from tests.training.running import Spoken


class LocalCrew(Crew):
    """Workers that do what they are told at once, one after the other.

    Args:
        run: Of the workers.
        dies: Told a worker's number, the method that is called, and the jobs that it was given:
            whether it dies once that is done, so that nobody hears of it.
    """

    def __init__(self, run: RunConfig, dies: Callable[[int, str, set[str]], bool] | None = None):
        self.run = run
        self.dies = dies or (lambda *_: False)
        self.workers: list[Worker | None] = []
        self.jobs: list[set[str]] = []

    def hire(self) -> int:
        self.workers.append(Worker(self.run, Path.cwd(), "loraloom train"))
        self.jobs.append(set())
        return len(self.workers) - 1

    def ask(self, worker: int, method: str, *args: Any) -> list[Any]:
        return [self._call(worker, method, args)]

    def _call(self, number: int, method: str, args: tuple[Any, ...]) -> Any:
        worker = self.workers[number]
        if worker is None:
            return WorkerLostError("killed")
        if method == "advance":
            started = [order for order in args[0] if isinstance(order, Start)]
            self.jobs[number] |= {order.config.name for order in started}
        try:
            value = getattr(worker, method)(*args)
        except LoraloomError as error:
            value = error
        if self.dies(number, method, self.jobs[number]):
            self.workers[number] = None
            return WorkerLostError("killed")
        return value

    def wait(self, calls, timeout_s):
        return list(calls)

    def answer(self, call):
        if isinstance(call[0], Exception):
            raise call[0]
        return call[0]

    def dismiss(self, worker):
        self.workers[worker] = None


def train_locally(
    run: RunConfig, num_workers: int = 2, dies=None, **options: Any
) -> tuple[list[JobResult], Spoken]:
    """Train a run on workers of this process, and return what was said, too."""
    spoken = Spoken()
    directory = RunDirectory(run.output_dir, by_job=True)
    os.makedirs(run.output_dir, exist_ok=True)
    results = train_with(
        LocalCrew(run, dies), num_workers, run, directory, progress=spoken, **options
    )
    return results, spoken
