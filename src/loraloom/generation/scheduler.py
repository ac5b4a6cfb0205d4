"""What an engine may use, who is served next, and who waits again when there is no room for all.

Customers (API keys) share the computed tokens evenly, and so do a customer's adapters, within which
requests are served as they came. Rows give way to those of whoever was served less. The cache is a
rectangle, as many rows as are served times the longest of them.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraloom.generation.sequence import Row, Share

# Tokens that a row must have room for when it joins others, so that it isn't sent back at once.
_ROOM = 16
# Tokens that one may be ahead of another who has as good as many rows.
_QUANTUM = 64


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may use."""

    max_rows: int = 32
    """Maximum number of completions at once."""
    cache_tokens: int = 32768
    """Size of the key-value cache: rows times tokens of the longest."""
    prefill_tokens: int = 256
    """Most tokens of prompts that are read between two decoding steps."""
    max_waiting: int = 256
    max_request_s: float = 600.0
    """Seconds after which a request fails, waiting included."""
    keeps_prompts: bool = True
    """What is kept of a prompt is of use to whoever sent it: to others, times would tell it."""
    shares_prompts: bool = False
    """Let all customers use it."""


class Scheduler:
    """Waiting requests, by virtual token counters (Sheng et al. 2024, arXiv:2401.00588)."""

    def __init__(self, max_rows: int, max_tokens: int):
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self._waiting: dict[Share, deque[Row]] = {}
        self._used: Counter[str | Share] = Counter()  # of customers, and of adapters of each

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Row]:
        for queue in self._waiting.values():
            yield from queue

    def add(self, row: Row, served: Sequence[Row]) -> None:
        shares = {*self._waiting, *(other.share for other in served)}
        tenants = {share.tenant for share in shares}
        mates = {share for share in shares if share.tenant == row.share.tenant}
        for newcomer, busy in ((row.share.tenant, tenants), (row.share, mates)):
            # who comes back after a while has no claim to what it did not use meanwhile
            if busy and newcomer not in busy:
                least = min(self._used[other] for other in busy)
                self._used[newcomer] = max(self._used[newcomer], least)
        self._waiting.setdefault(row.share, deque()).append(row)

    def put_back(self, row: Row) -> None:
        self._waiting.setdefault(row.share, deque()).appendleft(row)

    def charge(self, share: Share, num_tokens: int) -> None:
        self._used[share.tenant] += num_tokens
        self._used[share] += num_tokens

    def used(self, share: Share) -> tuple[int, int]:
        """Tokens of the customer and of its adapter: who has least is the next."""
        return self._used[share.tenant], self._used[share]

    def remove(self, row: Row) -> None:
        self._waiting[row.share].remove(row)
        if not self._waiting[row.share]:
            del self._waiting[row.share]

    def admit(self, served: Sequence[Row]) -> Row | None:
        """Take the next request out of the queue; nobody overtakes one that doesn't fit now."""
        row = self._next()
        if row is None or len(served) >= self.max_rows:
            return None
        if served:
            both = [*served, row]
            adapters = {other.request.adapter_name for other in both}
            if len(adapters) > 1 and any(other.is_suspect for other in both):
                return None
            if self.cached_tokens(both, added=_ROOM) > self.max_tokens:
                return None
        self.remove(row)
        return row

    def victim(self, served: Sequence[Row], movable: Sequence[Row]) -> Row | None:
        """Choose the row that makes room for the next request; None if nobody has to."""
        # Rows move from who has more of them to who has fewer, and where the numbers differ by one
        # they take turns, so that two who have as many each never drive one another out.
        row = self._next()
        if row is None:
            return None
        rows: Counter[str | Share] = Counter(other.share for other in served)
        rows.update(other.share.tenant for other in served)

        def lead(other: Row) -> tuple[int, int, int]:
            """In rows and tokens, of the customers or of one customer's adapters."""
            theirs, ours = other.share, row.share
            if theirs.tenant != ours.tenant:
                theirs, ours = theirs.tenant, ours.tenant
            return rows[theirs] - rows[ours], self._used[theirs] - self._used[ours], other.arrival

        leads = {lead(other): other for other in movable}
        allowed = [one for one in leads if one[0] > 1 and one[1] > 0]
        allowed += [one for one in leads if one[0] == 1 and one[1] > _QUANTUM]
        return leads[max(allowed)] if allowed else None

    def cached_tokens(self, served: Sequence[Row], added: int = 0) -> int:
        """Tokens of the cache that rows take up when each has `added` more."""
        return len(served) * max((row.length + added for row in served), default=0)

    def _next(self) -> Row | None:
        return None if not self._waiting else self._waiting[min(self._waiting, key=self.used)][0]
