"""Work on requests before and after the engine: templates, tokens, grammars, answers as JSON."""

import asyncio
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from loraloom.generation.request import RequestError
from loraloom.generation.tenants import FairLine, has_place
from loraloom.serve.process import start_apart

# So that a long piece of one tenant keeps nobody else's waiting.
NUM_THREADS = 2

_Value = TypeVar("_Value")
_Piece = tuple[Callable[[], Any], Future[Any]]


class Preparations:
    """Does pieces of work, first of the tenant that used least seconds, one of each at a time."""

    def __init__(self, max_requests: int = sys.maxsize, num_threads: int = NUM_THREADS):
        self._max_requests = max_requests
        self._num_threads = num_threads
        self._num_requests: Counter[str] = Counter()  # that are being prepared, by tenant
        self._line: FairLine[_Piece] = FairLine()
        self._busy: set[str] = set()
        self._num_running = 0
        self._lock = threading.Lock()

    @contextmanager
    def preparing(self, tenant: str) -> Iterator[None]:
        """Count a request, unless its tenant has as many as its part of the line."""
        if not has_place(self._num_requests, tenant, self._max_requests):
            raise RequestError(
                f"{self._num_requests[tenant]} requests of this key are being prepared; retry "
                "later, or send fewer at once",
                "queue_full",
            )
        self._num_requests[tenant] += 1
        try:
            yield
        finally:
            self._num_requests -= Counter([tenant])

    async def run(self, tenant: str, work: Callable[[], _Value]) -> _Value:
        """Do a piece of work in its turn, unless who waits for it is cancelled before."""
        # a future in a local variable would keep its error, whose traceback keeps the variable
        return await self._submit(tenant, work)

    def _submit(self, tenant: str, work: Callable[[], _Value]) -> asyncio.Future[_Value]:
        future: Future[_Value] = Future()
        with self._lock:
            self._line.add(tenant, (work, future))
            if self._num_running < self._num_threads:
                self._num_running += 1
                start_apart(self._work)
        return asyncio.wrap_future(future)

    def _work(self) -> None:
        """Do pieces of work until none is left whose tenant has no other under way."""
        while True:
            with self._lock:
                idle = [tenant for tenant in self._line.in_turn() if tenant not in self._busy]
                if not idle:
                    self._num_running -= 1
                    return
                tenant = idle[0]
                piece = self._line.waiting[tenant][0]
                self._line.remove(tenant, piece)
                self._busy.add(tenant)
            start = time.perf_counter()
            _do(*piece)
            del piece  # before the thread waits for its turn
            with self._lock:
                self._line.charge(tenant, time.perf_counter() - start)
                self._busy.remove(tenant)


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    """Do a piece of work; its error keeps no variable that keeps the error."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
    del work, future
