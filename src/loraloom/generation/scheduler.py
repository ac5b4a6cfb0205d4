"""What an engine may use, who is served next, and who waits again when there is no room for all.

Customers (API keys) share the computed tokens evenly, and so do a customer's adapters, within which
requests are served as they came. Rows give way to those of whoever was served less. The cache is a
rectangle, as many rows as are served times the longest of them.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from loraloom.generation.request import Row, Share
from loraloom.generation.tenants import FairLine

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


@dataclass(eq=False)
class Tenant:
    """A customer: the rows of its adapters, and how far its prompts may be read."""

    credit: int
    """Tokens of prompts that may be read for it while others' rows are decoded."""
    adapters: FairLine[Row] = field(default_factory=FairLine)


class Scheduler:
    """Waiting rows, and whose is the next to be admitted, read or sent back."""

    def __init__(self, limits: EngineLimits):
        self.max_rows = limits.max_rows
        self._limits = limits
        self._tenants = defaultdict[str, Tenant](lambda: Tenant(limits.prefill_tokens))
        self.line: FairLine[Row] = FairLine()  # of tenants

    def add(self, row: Row, *, is_first: bool = False) -> None:
        tenant, owner = row.share
        self.line.add(tenant, row, is_first=is_first)
        self._tenants[tenant].adapters.add(owner, row, is_first=is_first)

    def remove(self, row: Row) -> None:
        tenant, owner = row.share
        self.line.remove(tenant, row)
        self._tenants[tenant].adapters.remove(owner, row)

    def charge(self, share: Share, num_tokens: int) -> None:
        self.line.charge(share.tenant, num_tokens)
        self._tenants[share.tenant].adapters.charge(share.owner, num_tokens)

    def used(self, share: Share) -> tuple[int | float, int | float]:
        """Tokens of the customer and of its adapter: who has least is the next."""
        adapters = self._tenants[share.tenant].adapters
        return self.line.used(share.tenant), adapters.used(share.owner)

    def crowding(self) -> Row | None:
        """The row that gives its place in a full queue: the latest of whoever has most."""
        most = max(self.line.waiting.values(), key=len, default=())
        unbegun = [row for row in most if not row.new_ids]
        return max(unbegun, key=lambda row: row.arrival, default=None)

    def admit(self, served: Sequence[Row]) -> Row | None:
        """Take the next request out of the queue; nobody overtakes one that doesn't fit now."""
        row = self._next()
        if row is None or len(served) >= self.max_rows:
            return None
        if served:
            rows = [*served, row]
            if self.cached_tokens(rows, added=_ROOM) > self._limits.cache_tokens:
                return None
        self.remove(row)
        return row

    def victim(self, served: Sequence[Row], movable: Sequence[Row]) -> Row | None:
        """Choose the row that makes room for the next request; None if nobody has to."""
        # Rows move from who has more of them to who has fewer, and where the numbers differ by one
        # they take turns, so that two who have as many each never drive one another out.
        waiting = self._next()
        if waiting is None:
            return None
        num_rows: Counter[str | Share] = Counter(row.share for row in served)
        num_rows.update(row.share.tenant for row in served)
        tenant, adapter = self.used(waiting.share)
        leads: dict[tuple[int, int | float, int], Row] = {}
        for row in movable:
            used_by_tenant, used_by_adapter = self.used(row.share)
            if row.share.tenant == waiting.share.tenant:
                ahead = num_rows[row.share] - num_rows[waiting.share]
                num_tokens = used_by_adapter - adapter
            else:
                ahead = num_rows[row.share.tenant] - num_rows[waiting.share.tenant]
                num_tokens = used_by_tenant - tenant
            least_tokens = 0 if ahead > 1 else _QUANTUM
            if ahead > 0 and num_tokens > least_tokens:
                leads[ahead, num_tokens, row.arrival] = row
        return leads[max(leads)] if leads else None

    def give_credit(self, decoding: Sequence[Row], num_tokens: int) -> None:
        """Let tenants read `num_tokens` more of prompts, or as many as another of them decodes."""
        counts = Counter(row.share.tenant for row in decoding)
        for name, tenant in self._tenants.items():
            added = num_tokens
            for writer, count in counts.most_common(2):
                if writer != name:
                    added = max(added, count)
            tenant.credit = min(tenant.credit + added, self._limits.prefill_tokens)

    def charge_reading(self, share: Share, num_tokens: int, decoding: Sequence[Row]) -> None:
        self.charge(share, num_tokens)
        if any(row.share.tenant != share.tenant for row in decoding):
            self._tenants[share.tenant].credit -= num_tokens

    def readable(self, tenant: str, decoding: Sequence[Row]) -> int:
        """How many tokens of a tenant's prompts may be read while rows are decoded."""
        writers = {row.share.tenant for row in decoding} - {tenant}
        if not writers:
            return self._limits.prefill_tokens
        # who waits for a place, and has used less, comes up with its rows that are decoded
        used = self.line.used(tenant)
        waiting = writers & self.line.waiting.keys()
        is_ahead = any(self.line.used(name) + _QUANTUM < used for name in waiting)
        return 0 if is_ahead else self._tenants[tenant].credit

    def cached_tokens(self, served: Sequence[Row], added: int = 0) -> int:
        """Tokens of the cache that rows take up when each has `added` more."""
        return len(served) * max((row.length + added for row in served), default=0)

    def _next(self) -> Row | None:
        if not self.line:
            return None
        adapters = self._tenants[self.line.in_turn()[0]].adapters
        return adapters.waiting[adapters.in_turn()[0]][0]
