"""Whose turn it is: customers (API keys) share evenly what a server computes and prepares for them.

Turns follow virtual token counters (Sheng et al. 2024, arXiv:2401.00588, algorithm 2). Whoever used
least is the next. Whoever comes to the line is lifted to the least of those in it, or, if nobody
is, to whoever left it last: while away, nobody earns a claim, and nobody runs into debt.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from loraloom.generation.request import Row


@dataclass(eq=False)
class Account:
    """What someone has used of what several share."""

    used: int | float = 0


_Member = TypeVar("_Member", bound=Account)
_Item = TypeVar("_Item")


@dataclass(eq=False)
class Turn(Account, Generic[_Item]):
    """What waits in someone's name, and what they have used."""

    waiting: deque[_Item] = field(default_factory=deque)


class Line(Generic[_Member]):
    """Those who wait for something that they share."""

    def __init__(self) -> None:
        self._members: dict[_Member, None] = {}  # in the order in which they came
        self._last: _Member | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[_Member]:
        return iter(self._members)

    @property
    def least(self) -> int | float:
        """What whoever comes now is lifted to."""
        if self._members:
            return min(member.used for member in self._members)
        return 0 if self._last is None else self._last.used

    def lift(self, member: _Member) -> None:
        if member not in self._members:
            member.used = max(member.used, self.least)

    def join(self, member: _Member) -> None:
        self.lift(member)
        self._members[member] = None

    def leave(self, member: _Member) -> None:
        del self._members[member]
        self._last = member

    def next(self) -> _Member | None:
        return min(self._members, key=lambda member: member.used, default=None)


@dataclass(eq=False)
class Tenant(Account):
    """A customer: what waits in its name, and the tokens that were computed for it."""

    credit: int = 0
    """Tokens of prompts that may be read for it while others' rows are decoded."""
    adapters: dict[str, Turn[Row]] = field(default_factory=dict)
    line: Line[Turn[Row]] = field(default_factory=Line)
    """Of its adapters, those with rows that wait."""

    @property
    def num_waiting(self) -> int:
        return sum(len(turn.waiting) for turn in self.line)

    def turn_of(self, owner: str) -> Turn[Row]:
        """The turn of an adapter; those that have no claim and no debt are forgotten."""
        if owner not in self.adapters:
            least = self.line.least
            kept = {
                name: turn
                for name, turn in self.adapters.items()
                if turn.waiting or turn.used > least
            }
            self.adapters = {**kept, owner: Turn()}
        return self.adapters[owner]
