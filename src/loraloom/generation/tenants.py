"""Whose turn it is: customers (API keys) share evenly what a server computes and prepares for them.

Turns follow virtual token counters (Sheng et al. 2024, arXiv:2401.00588, algorithm 2). Whoever used
least is the next. Whoever comes to the line is lifted to the least of those in it, or, if nobody
is, to whoever left it last: while away, nobody earns a claim, and nobody runs into debt.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class FairLine(Generic[_Item]):
    """What waits in the names of those who share something, and how much each has used of it."""

    def __init__(self) -> None:
        self.waiting: dict[str, deque[_Item]] = {}
        self._used: dict[str, int | float] = {}
        self._last: str | None = None  # of those who left the line

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def __iter__(self) -> Iterator[_Item]:
        return chain.from_iterable(self.waiting.values())

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(items) for name, items in self.waiting.items()}

    @property
    def _least(self) -> int | float:
        if self.waiting:
            return min(self._used[name] for name in self.waiting)
        return 0 if self._last is None else self._used[self._last]

    def used(self, name: str) -> int | float:
        if name not in self._used:
            return self._least
        return self._used[name]

    def charge(self, name: str, amount: int | float) -> None:
        self._used[name] = self.used(name) + amount

    def lift(self, name: str) -> None:
        """Let someone who comes have no claim from before."""
        if name in self.waiting:
            return
        least = self._least
        # those below come as newcomers do, and are forgotten
        self._used = {key: used for key, used in self._used.items() if used >= least}
        self._used.setdefault(name, least)

    def add(self, name: str, item: _Item, *, is_first: bool = False) -> None:
        self.lift(name)
        items = self.waiting.setdefault(name, deque())
        if is_first:
            items.appendleft(item)
        else:
            items.append(item)

    def remove(self, name: str, item: _Item) -> None:
        items = self.waiting[name]
        items.remove(item)
        if not items:
            del self.waiting[name]
            self._last = name

    def in_turn(self) -> list[str]:
        """Name those who wait, who used least first."""
        return sorted(self.waiting, key=self.used)


def has_place(counts: Mapping[str, int], name: str, max_items: int) -> bool:
    """Whether a queue is not full, or someone has less than an equal part of it."""
    if sum(counts.values()) < max_items:
        return True
    num_names = len({*counts, name})
    return counts.get(name, 0) * num_names < max_items
