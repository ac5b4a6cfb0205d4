"""Workers in processes of their own, whatever starts them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class WorkerLostError(Exception):
    """A worker can't be reached any more, or its base model no longer works."""


class CrewLost(BaseException):
    """No worker is left.

    It is no `Exception`, as a sweep takes those for faults of the job that it builds.
    """


class Crew(ABC):
    """Starts workers, calls their methods and waits for what comes of it.

    Workers and calls are whatever an implementation takes for them; a worker does one call after
    the other.
    """

    @abstractmethod
    def hire(self) -> Any:
        """Start a worker; its calls wait until it is there."""

    @abstractmethod
    def ask(self, worker: Any, method: str, *args: Any) -> Any:
        """Call a worker's method, and return the call."""

    @abstractmethod
    def wait(self, calls: Sequence[Any], timeout_s: float) -> list[Any]:
        """Wait until a call is answered, and return all that are; none after that time."""

    @abstractmethod
    def answer(self, call: Any) -> Any:
        """Wait for what a call returns."""

    @abstractmethod
    def dismiss(self, worker: Any) -> None:
        """End a worker, if it is still there."""
