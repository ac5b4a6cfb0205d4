"""What an engine may use, who is served next, and who waits again when there is no room for all.

Customers (API keys) share the computed tokens evenly, and so do a customer's adapters, within which
requests are served as they came. Rows give way to those of whoever was served less. The cache is a
rectangle, as many rows as are served times the longest of them.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraloom.generation.request import Row, Share
from loraloom.generation.tenants import Line, Tenant

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
    """Waiting rows, and whose is the next to be admitted, read or sent back."""

    def __init__(self, max_rows: int, max_tokens: int, max_credit: int = 256):
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.tenants: dict[str, Tenant] = {}
        self._line: Line[Tenant] = Line()  # of tenants with rows that wait
        self._max_credit = max_credit

    def __len__(self) -> int:
        return sum(tenant.num_waiting for tenant in self._line)

    def __iter__(self) -> Iterator[Row]:
        for tenant in self._line:
            for turn in tenant.line:
                yield from turn.waiting

    def tenant(self, name: str) -> Tenant:
        return self.tenants.setdefault(name, Tenant(credit=self._max_credit))

    def lift(self, name: str) -> None:
        """Let a tenant that comes for something other than a row have no claim from before."""
        self._line.lift(self.tenant(name))

    def add(self, row: Row) -> None:
        self._join(row).append(row)

    def put_back(self, row: Row) -> None:
        self._join(row).appendleft(row)

    def _join(self, row: Row) -> deque[Row]:
        tenant = self.tenant(row.share.tenant)
        turn = tenant.turn_of(row.share.owner)
        self._line.join(tenant)
        tenant.line.join(turn)
        return turn.waiting

    def charge(self, share: Share, num_tokens: int) -> None:
        tenant = self.tenant(share.tenant)
        tenant.used += num_tokens
        tenant.turn_of(share.owner).used += num_tokens

    def used(self, share: Share) -> tuple[int | float, int | float]:
        """Tokens of the customer and of its adapter: who has least is the next."""
        tenant = self.tenant(share.tenant)
        return tenant.used, tenant.turn_of(share.owner).used

    def remove(self, row: Row) -> None:
        tenant = self.tenant(row.share.tenant)
        turn = tenant.turn_of(row.share.owner)
        turn.waiting.remove(row)
        if not turn.waiting:
            tenant.line.leave(turn)
        if not tenant.line:
            self._line.leave(tenant)

    def crowding(self, name: str, max_waiting: int) -> Row | None:
        """The row that gives its place in a full queue to a tenant; None: it has its part of it."""
        tenant = self.tenant(name)
        num_tenants = len({*self._line, tenant})
        if tenant.num_waiting * num_tenants >= max_waiting:
            return None
        largest = max(self._line, key=lambda other: other.num_waiting)
        rows = [row for turn in largest.line for row in turn.waiting if not row.new_ids]
        return max(rows, key=lambda row: row.arrival, default=None)

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

        def lead(other: Row) -> tuple[int, int | float, int]:
            """In rows and tokens, of the customers or of one customer's adapters."""
            theirs, ours = other.share, row.share
            level = 1
            if theirs.tenant != ours.tenant:
                theirs, ours = theirs.tenant, ours.tenant
                level = 0
            num_tokens = self.used(other.share)[level] - self.used(row.share)[level]
            return rows[theirs] - rows[ours], num_tokens, other.arrival

        leads = {lead(other): other for other in movable}
        allowed = [one for one in leads if one[0] > 1 and one[1] > 0]
        allowed += [one for one in leads if one[0] == 1 and one[1] > _QUANTUM]
        return leads[max(allowed)] if allowed else None

    def give_credit(self, decoding: Sequence[Row], num_tokens: int) -> None:
        """Let tenants read `num_tokens` more of prompts, or as many as another of them decodes."""
        most = Counter(row.share.tenant for row in decoding).most_common(2)
        for name, tenant in self.tenants.items():
            added = max([num_tokens, *(count for other, count in most if other != name)])
            tenant.credit = min(tenant.credit + added, self._max_credit)

    def charge_reading(self, share: Share, num_tokens: int, decoding: Sequence[Row]) -> None:
        self.charge(share, num_tokens)
        if any(row.share.tenant != share.tenant for row in decoding):
            self.tenant(share.tenant).credit -= num_tokens

    def readable(self, name: str, decoding: Sequence[Row]) -> int:
        """How many tokens of a tenant's prompts may be read while rows are decoded."""
        tenant = self.tenant(name)
        others = {self.tenant(row.share.tenant) for row in decoding} - {tenant}
        if not others:
            return self._max_credit
        # who waits for a place, and has used less, comes up with its rows that are decoded
        behind = [other for other in others if other.used + _QUANTUM < tenant.used]
        is_ahead = any(other in behind for other in self._line)
        return 0 if is_ahead else tenant.credit

    def cached_tokens(self, served: Sequence[Row], added: int = 0) -> int:
        """Tokens of the cache that rows take up when each has `added` more."""
        return len(served) * max((row.length + added for row in served), default=0)

    def _next(self) -> Row | None:
        tenant = self._line.next()
        turn = None if tenant is None else tenant.line.next()
        return None if turn is None else turn.waiting[0]
