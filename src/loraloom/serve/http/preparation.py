"""Work on requests before and after the engine: templates, tokens, grammars, answers as JSON."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from loraloom.generation.request import RequestError
from loraloom.generation.scheduler import EngineLimits
from loraloom.generation.tenants import Line, Turn
from loraloom.serve.process import start_apart

# So that a long piece of one tenant keeps nobody else's waiting.
NUM_THREADS = 2

_Value = TypeVar("_Value")
_Piece = tuple[Callable[[], Any], Future[Any]]


class Preparations:
    """Does pieces of work, first of the tenant that used least seconds, one of each at a time."""

    def __init__(self, limits: EngineLimits):
        self._limits = limits
        self._num_requests: Counter[str] = Counter()  # that are being prepared, by tenant
        self._turns: dict[str, Turn[_Piece]] = {}
        self._line: Line[Turn[_Piece]] = Line()
        self._busy: set[Turn[_Piece]] = set()
        self._wake = threading.Condition()
        self._is_stopping = False

    def start(self) -> None:
        for _ in range(NUM_THREADS):
            start_apart(self._work)

    def stop(self) -> None:
        with self._wake:
            self._is_stopping = True
            self._wake.notify_all()

    @contextmanager
    def preparing(self, tenant: str) -> Iterator[None]:
        """Count a request, unless its tenant has as many as its part of the line."""
        num_tenants = len(self._num_requests.keys() | {tenant})
        max_requests = self._limits.max_rows + self._limits.max_waiting
        if self._num_requests[tenant] * num_tenants >= max_requests:
            raise RequestError(
                f"{self._num_requests[tenant]} requests of this key are being prepared; retry "
                "later, or send fewer at once",
                "queue_full",
            )
        self._num_requests[tenant] += 1
        try:
            yield
        finally:
            self._num_requests[tenant] -= 1
            self._num_requests += Counter()  # without those that have none

    async def run(self, tenant: str, work: Callable[[], _Value]) -> _Value:
        """Do a piece of work in its turn, unless who waits for it is cancelled before."""
        future: Future[_Value] = Future()
        with self._wake:
            turn = self._turns.setdefault(tenant, Turn())
            self._line.join(turn)
            turn.waiting.append((work, future))
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _next(self) -> Turn[_Piece] | None:
        turns = [turn for turn in self._line if turn not in self._busy]
        return min(turns, key=lambda turn: turn.used, default=None)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_stopping or self._next() is not None)
                turn = self._next()
                if turn is None:
                    return
                self._busy.add(turn)
                work, future = turn.waiting.popleft()
            start = time.perf_counter()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            with self._wake:
                turn.used += time.perf_counter() - start
                self._busy.remove(turn)
                if not turn.waiting:
                    self._line.leave(turn)
                self._wake.notify()
