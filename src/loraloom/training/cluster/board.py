"""Who trains where: jobs wait, go to a worker that has room, and go elsewhere when it is lost.

A job of higher priority goes first, and among equal ones the one that came first. It goes to the
worker that it fills least, as a share of its room. One that fits nowhere yet keeps the emptiest
worker free of others, and jobs behind it go to the rest.

Whose fault a lost worker is can't be told, as several jobs share one. So a job that has lost
workers time and again, without getting any further, goes on alone: if that worker is lost too, the
job is given up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LOSSES = 3
"""Workers that a job may lose at one place before it is given up."""


@dataclass(frozen=True)
class Size:
    """The memory that a job takes on a worker, in bytes.

    Args:
        kept: Its weights, and what learning keeps beside them.
        step: What a step of it keeps for the backward pass.
        tokens: Of that step, with padding.
    """

    kept: int
    step: int
    tokens: int


@dataclass
class Ticket:
    """A job on the board.

    Args:
        name: Of the job.
        size: Its memory.
        priority: The higher goes first.
        number: The lower goes first.
        worker: Where it trains; None while it waits.
        began_at: The step where it began on its last worker.
        losses: Workers that it has lost there.
        refused: It did not fit beside others after all.
    """

    name: str
    size: Size
    priority: float
    number: int
    worker: int | None = None
    began_at: int = 0
    losses: int = 0
    refused: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it shares its worker with nobody."""
        return self.refused or self.losses >= MAX_LOSSES - 1


class Board:
    """Jobs and workers by what is known of them.

    Attributes:
        rooms: Bytes that each worker has for jobs, by its number; None where nobody can tell.
    """

    def __init__(self, max_tokens_per_step: int | None = None):
        self.rooms: dict[int, int | None] = {}
        self._max_tokens = max_tokens_per_step
        self._tickets: dict[str, Ticket] = {}
        self._entered = 0

    def open(self, worker: int, room: int | None) -> None:
        """Let a worker take jobs."""
        self.rooms[worker] = room

    def enter(self, name: str, size: Size, priority: float = 1.0) -> None:
        """Let a job wait for a worker."""
        self._tickets[name] = Ticket(name, size, priority, self._entered)
        self._entered += 1

    def leave(self, name: str) -> None:
        """Forget a job that is done."""
        del self._tickets[name]

    def refuse(self, name: str) -> bool:
        """Let a job wait again that its worker couldn't take."""
        ticket = self._tickets[name]
        was_alone, ticket.worker, ticket.refused = ticket.is_alone, None, True
        return not was_alone

    def began(self, name: str, step: int) -> None:
        """Note at which step a job began on its worker: it may have got further than before."""
        ticket = self._tickets[name]
        if step > ticket.began_at:
            ticket.began_at, ticket.losses = step, min(ticket.losses, 1)

    def lose(self, worker: int) -> list[str]:
        """Take a worker off, whose jobs wait again."""
        del self.rooms[worker]
        lost = self._on(worker)
        for ticket in lost:
            ticket.worker = None
            ticket.losses += 1
        return [ticket.name for ticket in lost if ticket.losses >= MAX_LOSSES]

    def worker_of(self, name: str) -> int | None:
        """Tell where a job trains; None if it waits, or is unknown."""
        ticket = self._tickets.get(name)
        return None if ticket is None else ticket.worker

    def jobs_on(self, worker: int) -> list[str]:
        """Name the jobs of a worker."""
        return [ticket.name for ticket in self._on(worker)]

    @property
    def waiting(self) -> list[str]:
        """Names of the jobs that have no worker, those first that go first."""
        return [ticket.name for ticket in self._waiting()]

    def place(self) -> list[tuple[str, int]]:
        """Give waiting jobs to workers."""
        placed: list[tuple[str, int]] = []
        kept_free: set[int] = set()
        for ticket in self._waiting():
            open_to_all = [worker for worker in self.rooms if worker not in kept_free]
            fitting = [worker for worker in open_to_all if self._fits(ticket, worker)]
            if fitting:
                ticket.worker = min(fitting, key=lambda worker: self._share(worker, ticket))
                placed.append((ticket.name, ticket.worker))
            elif open_to_all:
                kept_free.add(min(open_to_all, key=self._share))
        return placed

    def _waiting(self) -> list[Ticket]:
        waiting = [ticket for ticket in self._tickets.values() if ticket.worker is None]
        return sorted(waiting, key=lambda ticket: (-ticket.priority, ticket.number))

    def _on(self, worker: int) -> list[Ticket]:
        return [ticket for ticket in self._tickets.values() if ticket.worker == worker]

    def _fits(self, ticket: Ticket, worker: int) -> bool:
        """Whether a job may join a worker's; the roomiest one tries whatever comes to it alone."""
        others, room = self._on(worker), self.rooms[worker]
        if not others:
            return room is None or room == self._largest or self._need([ticket]) <= room
        if ticket.is_alone or any(other.is_alone for other in others):
            return False
        return room is None or self._need([*others, ticket]) <= room

    @property
    def _largest(self) -> int | None:
        return max((room for room in self.rooms.values() if room is not None), default=None)

    def _share(self, worker: int, *joining: Ticket) -> tuple[int | float, int]:
        """How full a worker is, or will be; of equal ones the first."""
        room, need = self.rooms[worker], self._need([*self._on(worker), *joining])
        return (need if room is None else need / room if room > 0 else math.inf), worker

    def _need(self, tickets: Iterable[Ticket]) -> int | float:
        return memory_together([ticket.size for ticket in tickets], self._max_tokens)


def memory_together(sizes: Sequence[Size], max_tokens_per_step: int | None) -> int | float:
    """Return the most bytes that jobs take together.

    Every job has its step in each round, unless rounds are bounded: then none is larger than a
    round that is full of the job whose tokens take most.
    """
    kept, steps = sum(size.kept for size in sizes), sum(size.step for size in sizes)
    if max_tokens_per_step is None:
        return kept + steps
    per_token = max((size.step / max(size.tokens, 1) for size in sizes), default=0.0)
    return kept + min(steps, max_tokens_per_step * per_token)
