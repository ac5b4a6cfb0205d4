"""The workers of a run by number, and the calls to them that are on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loraloom.errors import LoraloomError, TrainingError
from loraloom.training.cluster.crew import Crew, WorkerLostError

TELL_S = 20.0
"""How often the user is told of workers that start or load the base model."""


@dataclass(frozen=True)
class Answer:
    """What came of a call.

    Args:
        worker: Number of the worker.
        method: That was called.
        value: What it has returned, or the error that it has raised.
    """

    worker: int
    method: str
    value: Any


class Staff:
    """Workers by number. Each has one call on the way at most."""

    def __init__(self, crew: Crew):
        self._crew = crew
        self._workers: dict[int, Any] = {}
        self._calls: dict[int, tuple[Any, str]] = {}
        self._hired = 0

    def hire(self) -> int:
        """Start a worker, and return its number."""
        number, self._hired = self._hired, self._hired + 1
        self._workers[number] = self._crew.hire()
        return number

    @property
    def numbers(self) -> list[int]:
        """All workers that were not dismissed."""
        return list(self._workers)

    def is_busy(self, worker: int) -> bool:
        """Whether a call to a worker is on the way."""
        return worker in self._calls

    def send(self, worker: int, method: str, *args: Any) -> None:
        """Call a method; `answers` or `finish` gives what comes of it."""
        assert worker not in self._calls, "a worker does one thing at a time"
        self._calls[worker] = self._crew.ask(self._workers[worker], method, *args), method

    def answers(self, timeout_s: float) -> Iterator[Answer]:
        """Wait until a call is answered, and give all answers that are there."""
        calls = [call for call, _ in self._calls.values()]
        done = self._crew.wait(calls, timeout_s) if calls else []
        for worker in [worker for worker, (call, _) in self._calls.items() if call in done]:
            if (answer := self.finish(worker)) is not None:
                yield answer

    def finish(self, worker: int) -> Answer | None:
        """Wait for the answer of the call that is on the way to a worker, if any is."""
        if worker not in self._calls:
            return None
        call, method = self._calls.pop(worker)
        try:
            return Answer(worker, method, self._crew.answer(call))
        except (LoraloomError, WorkerLostError) as error:
            return Answer(worker, method, error)

    def ask(self, worker: int, method: str, *args: Any) -> Any:
        """Call a method and wait for what it returns; nothing else may be on the way."""
        self.send(worker, method, *args)
        return self._value(worker)

    def all_answered(self, timeout_s: float, say: Callable[[str], None]) -> bool:
        """Wait until every call on the way is answered, and tell whether that was in time."""
        began_at = time.monotonic()
        waiting = [call for call, _ in self._calls.values()]
        while waiting and (passed_s := time.monotonic() - began_at) < timeout_s:
            if passed_s >= TELL_S:
                ready = len(self._calls) - len(waiting)
                say(f"waiting for worker {ready + 1} of {len(self._calls)} ({passed_s:.0f} s)")
            done = self._crew.wait(waiting, min(timeout_s - passed_s, TELL_S))
            waiting = [call for call in waiting if call not in done]
        return not waiting

    def result(self, worker: int) -> Any:
        """Wait for what the call on the way to a worker returns; which is there or comes."""
        try:
            return self._value(worker)
        except WorkerLostError as lost:
            raise TrainingError(f"worker {worker} was lost: {lost}") from lost

    def dismiss(self, worker: int) -> None:
        """End a worker; what is on the way to it is forgotten."""
        self._calls.pop(worker, None)
        self._crew.dismiss(self._workers.pop(worker))

    def _value(self, worker: int) -> Any:
        answer = self.finish(worker)
        assert answer is not None
        if isinstance(answer.value, LoraloomError | WorkerLostError):
            raise answer.value
        return answer.value
