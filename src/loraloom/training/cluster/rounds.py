"""Keeping the jobs of a sweep in step where workers are not.

In a process of its own a sweep judges jobs that come to an evaluation in the same round together,
and what it decides depends on who came there before. Workers train at paces of their own. So each
job of a sweep counts its rounds, from the one in which it began, and waits at its evaluations and
its end until all the others have come as far. What is decided then is what one process decides,
whoever trains faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loraloom.training.run.job import Position
from loraloom.training.run.results import JobResult


@dataclass(frozen=True)
class Event:
    """An evaluation or the end of a job.

    Args:
        round: In which it was.
        position: Where the job stands.
        result: What became of it, if it has ended.
    """

    round: int
    position: Position
    result: JobResult | None = None


class Rounds:
    """Events of jobs that wait to be judged.

    Attributes:
        events: By job.
        now: The round of the last ones that were judged.
    """

    def __init__(self) -> None:
        self.events: dict[str, Event] = {}
        self.now = 0
        self._judged: dict[str, int] = {}

    def note(self, job: str, event: Event) -> None:
        """Take an event in, unless it was judged before."""
        if event.result is not None or self._judged.get(job) != event.position.step:
            self.events[job] = event

    def forget(self, job: str) -> None:
        """Forget what a job has come to, as it comes there again."""
        self.events.pop(job, None)
        self._judged.pop(job, None)

    def take(self, others: Mapping[str, int]) -> dict[str, Event]:
        """Take the events of the next round out, if all jobs have come as far."""
        first = min((event.round for event in self.events.values()), default=None)
        if first is None or any(round_ < first for round_ in others.values()):
            return {}
        self.now = first
        due = {job: event for job, event in self.events.items() if event.round == first}
        for job, event in due.items():
            del self.events[job]
            self._judged[job] = event.position.step
        return due
