"""Who is served next, and who waits again when memory is short.

Adapters get fair shares of the computed tokens; within an adapter, requests are served in the order
in which they came. The cache is a rectangle, as many rows as are served times the longest of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from loraloom.serve.sequence import Row

_ROOM = 16
"""Tokens that a row must have room for when it joins others, so that it isn't sent back at once."""


class Scheduler:
    """The requests that wait.

    Source:
        Sheng et al. 2024, Fairness in Serving Large Language Models, arXiv:2401.00588: the virtual
        token counter.
    """

    def __init__(self, max_rows: int, max_tokens: int):
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self._waiting: dict[str, deque[Row]] = {}
        self._used: dict[str, int] = {}
        self._suspects: set[str | None] = set()

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Row]:
        """Go through the requests that wait."""
        for queue in self._waiting.values():
            yield from queue

    def add(self, row: Row, served: Sequence[Row]) -> None:
        """Let a request wait; `served` are the rows under way."""
        if row.owner not in self._waiting:
            busy = {*self._waiting, *(other.owner for other in served)} - {row.owner}
            # who comes back after a while has no claim to what it did not use meanwhile
            least = min((self._used.get(owner, 0) for owner in busy), default=0)
            self._used[row.owner] = max(self._used.get(row.owner, 0), least)
            self._waiting[row.owner] = deque()
        self._waiting[row.owner].append(row)

    def put_back(self, row: Row) -> None:
        """Let a row wait that was served already: it is the next of its adapter."""
        self._waiting.setdefault(row.owner, deque()).appendleft(row)

    def charge(self, owner: str, num_tokens: int) -> None:
        """Count tokens that were computed."""
        self._used[owner] = self._used.get(owner, 0) + num_tokens

    def remove(self, row: Row) -> None:
        """Forget a request that waits."""
        self._waiting[row.owner].remove(row)
        self._drop_if_empty(row.owner)

    def admit(self, served: Sequence[Row]) -> Row | None:
        """Take the next request out of the queue; None if there is none that fits.

        Nobody overtakes: a request that doesn't fit now is the next one when others have ended.
        """
        if not self._waiting or len(served) >= self.max_rows:
            return None
        owner = min(self._waiting, key=lambda owner: self._used.get(owner, 0))
        row = self._waiting[owner][0]
        if not self._may_join(row, served):
            return None
        self._waiting[owner].popleft()
        self._drop_if_empty(owner)
        return row

    def cached_tokens(self, served: Sequence[Row], added: int = 0) -> int:
        """Tokens of the cache that rows take up when each has `added` more."""
        return len(served) * max((row.length + added for row in served), default=0)

    def suspect(self, rows: Sequence[Row]) -> None:
        """Serve the adapters of rows that failed together apart from others."""
        self._suspects |= {row.request.adapter_name for row in rows}

    def clear(self, rows: Sequence[Row]) -> None:
        """Trust the adapters of rows that went well."""
        self._suspects -= {row.request.adapter_name for row in rows}

    def _may_join(self, row: Row, served: Sequence[Row]) -> bool:
        if not served:
            return True
        adapters = {other.request.adapter_name for other in served}
        own = row.request.adapter_name
        if self._suspects & {*adapters, own} and adapters != {own}:
            return False
        return self.cached_tokens([*served, row], added=_ROOM) <= self.max_tokens

    def _drop_if_empty(self, owner: str) -> None:
        if not self._waiting[owner]:
            del self._waiting[owner]
