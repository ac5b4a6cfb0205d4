"""Bringing workers to work: each sees the files, loads the base model, and has room for jobs."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraloom.durable import staging
from loraloom.errors import ConfigError
from loraloom.training.cluster.board import Board
from loraloom.training.cluster.staff import Answer, Staff
from loraloom.training.cluster.worker import Loaded
from loraloom.training.run.checkpoint import describe_changes
from loraloom.training.run.outputs import nearest_existing

START_S = 600.0
"""How long workers may take to start, as the cluster may be busy with something else."""
MAX_FAILED_STARTS = 3
"""Workers in a row that may be lost before they are ready; then no other takes their place."""


class Hiring:
    """Workers on their way to the board.

    Attributes:
        base: The base model, as snapshots say it.
    """

    def __init__(self, staff: Staff, board: Board, output_dir: Path):
        self.base: dict[str, Any] = {}
        self._staff = staff
        self._board = board
        self._output_dir = output_dir
        self._shares: dict[str, int | None] = {}
        self._failed_starts = 0
        self._hired_at = -math.inf

    def assemble(self, num_workers: int, seconds: float, say: Callable[[str], None]) -> None:
        """Start the workers of a run, and bring all of them to the board."""
        say(f"starting {num_workers} workers")
        for _ in range(num_workers):
            self._staff.hire()
        with staging(nearest_existing(self._output_dir)) as mark:
            blind = {machine for machine in self._ask_all(say, "see", mark).values() if machine}
        if blind:
            raise ConfigError(
                f"output_dir must be on storage that all workers see, {self._output_dir} is not "
                f"seen on {', '.join(sorted(blind))}; name a directory on a shared file system"
            )
        say("all workers are there; they load the base model")
        loaded: dict[int, Loaded] = self._ask_all(say, "load")
        self._check_alike(loaded)
        self._share_memory(loaded)
        for worker, one in loaded.items():
            self._open(worker, one, seconds)
        for worker in loaded:
            self._board.open(worker, self._staff.result(worker))

    @property
    def is_going_on(self) -> bool:
        """Whether a worker is on its way, and was started so lately that it may still come."""
        is_late = time.monotonic() - self._hired_at > START_S
        return not is_late and any(one not in self._board.rooms for one in self._staff.numbers)

    def replace(self, *, was_ready: bool) -> bool:
        """Start a worker in place of a lost one, and tell whether that makes sense."""
        self._failed_starts += not was_ready
        if self._failed_starts >= MAX_FAILED_STARTS:
            return False
        self._hired_at = time.monotonic()
        self._staff.send(self._staff.hire(), "see", self._output_dir.absolute())
        return True

    def take(self, answer: Answer, seconds: float) -> str | None:
        """Bring a worker that has answered one step further."""
        match answer.method, answer.value:
            case _, Exception() as error:
                return str(error)
            case "see", None:
                self._staff.send(answer.worker, "load")
            case "see", machine:
                return f"{machine} does not see {self._output_dir}"
            case "load", Loaded() as loaded if loaded.base != self.base:
                return f"{loaded.machine} has another base model"
            case "load", Loaded() as loaded:
                self._open(answer.worker, loaded, seconds)
            case "open", room:
                self._failed_starts = 0
                self._board.open(answer.worker, room)
        return None

    def _ask_all(self, say: Callable[[str], None], method: str, *args: Any) -> dict[int, Any]:
        workers = self._staff.numbers
        for worker in workers:
            self._staff.send(worker, method, *args)
        if not self._staff.all_answered(START_S if method == "see" else math.inf, say):
            raise ConfigError(
                f"{len(workers)} workers must find room on the cluster, some did not within "
                f"{START_S:.0f} s; give a lower --ray-workers, or wait until others are done"
            )
        return {worker: self._staff.result(worker) for worker in workers}

    def _check_alike(self, loaded: dict[int, Loaded]) -> None:
        first, *others = loaded.values()
        self.base = first.base
        for other in others:
            if changes := describe_changes(first.base, other.base, "base"):
                raise ConfigError(
                    f"all workers must have the same base model, {first.machine} and "
                    f"{other.machine} differ: {'; '.join(changes)}; let them see the same files"
                )

    def _share_memory(self, loaded: dict[int, Loaded]) -> None:
        """Divide the memory of each machine among its workers; accelerators have their own."""
        on_machine = defaultdict(list)
        for one in loaded.values():
            if one.is_on_cpu and one.free_bytes is not None:
                on_machine[one.machine].append(one.free_bytes)
        for machine, free in on_machine.items():  # the last to load has seen what all of them hold
            self._shares[machine] = min(free) // len(free)

    def _open(self, worker: int, loaded: Loaded, seconds: float) -> None:
        """Let a worker get ready; one that takes another's place on a machine gets its share."""
        share = self._shares.get(loaded.machine, loaded.free_bytes)
        self._staff.send(worker, "open", share, seconds)
