"""Requests for adapters that are not loaded, in an order that is fair to tenants (API keys)."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from loraloom.generation.request import RequestError


@dataclass(eq=False)
class Waiting:
    """A request that waits for an adapter."""

    name: str
    tenant: str
    served: asyncio.Future[Any]


class WaitingLine:
    """Those of a tenant come in turn as they came, and tenants take turns."""

    def __init__(self, max_waiting: int):
        self._max_waiting = max_waiting
        self._requests: list[Waiting] = []
        self._last_turn: Counter[str] = Counter()  # of each tenant
        self._turns = count(1)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Waiting) -> bool:
        return request in self._requests

    def add(self, name: str, tenant: str) -> Waiting:
        """Let a request wait, unless too many do and its tenant has an equal part of the line."""
        num_waiting = Counter(request.tenant for request in self._requests)
        equal_part = self._max_waiting // len({*num_waiting, tenant})
        if len(self) >= self._max_waiting and num_waiting[tenant] >= equal_part:
            raise no_place(f"{num_waiting[tenant]} requests wait for adapters that are not loaded")
        request = Waiting(name, tenant, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        return request

    def remove(self, request: Waiting) -> None:
        self._requests.remove(request)

    def pop(self, name: str) -> Iterator[Waiting]:
        """Take those out that wait for an adapter."""
        for request in [request for request in self._requests if request.name == name]:
            self.remove(request)
            yield request

    def in_turn(self, num_held: Counter[str], num_places: int) -> list[Waiting]:
        """List requests, first those of tenants that would hold no more than an equal part."""
        tenants = {request.tenant for request in self._requests} | num_held.keys()

        def turn(request: Waiting) -> tuple[float, int]:
            num_places_then = num_held[request.tenant] + 1
            return max(num_places_then, num_places / len(tenants)), self._last_turn[request.tenant]

        return sorted(self._requests, key=turn)

    def take_turn(self, request: Waiting) -> None:
        self._last_turn[request.tenant] = next(self._turns)


def no_place(fault: str) -> RequestError:
    advice = "retry later, or start the server with a larger --max-adapters"
    return RequestError(f"{fault}; {advice}", "queue_full")
