"""The process that listens: what clients may hold of it, and how it ends.

uvicorn bounds neither connections nor the time that a client takes to send a request. Here both
are bounded, so that clients that send nothing leave room for the others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from loraloom.errors import ConfigError
from loraloom.generation.engine import Engine

# Accepted beyond the limit, when all within it are being answered: they may ask for health.
SPARE_CONNECTIONS = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """What clients may hold of the server without asking anything."""

    max_connections: int | None = None
    """Connections at once; None for as many as fit the limit of open files."""
    header_s: float = 10.0
    """Seconds in which the headers of a request must have come."""
    body_s: float = 60.0
    """The same of a body, and until the client reads some of the answer that waits for it."""
    idle_s: float = 30.0
    """Seconds without a request after which a connection is closed."""

    def __post_init__(self) -> None:
        room = max(1, _max_open_files() * 3 // 4 - SPARE_CONNECTIONS)
        if (self.max_connections or 0) > room:
            raise ConfigError(
                f"--max-connections must be at most {room} where a process may open "
                f"{_max_open_files():,} files, got {self.max_connections}; raise `ulimit -n`"
            )
        if self.max_connections is None:
            object.__setattr__(self, "max_connections", min(room, 1024))


# whatever changes what is awaited of a client goes through four methods of uvicorn
def _and_watch(method: Callable[..., None]) -> Callable[..., None]:
    def watched(self: _Connection, *args: Any) -> None:
        method(self, *args)
        self._watch()

    return watched


class _Connection(H11Protocol):
    """A connection that is closed when its client is too slow, or it is the idlest of too many."""

    def __init__(self, limits: ConnectionLimits, closed: Counter[str], **settings: Any):
        super().__init__(**settings)
        self._limits = limits
        self._closed = closed  # how many connections were closed, by reason
        self._seconds = {"header": limits.header_s, "body": limits.body_s, "read": limits.body_s}
        self._awaited: tuple[str, Any] = ("", None)
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()
        connections: set[Any] = self.connections
        excess = len(connections) - (self._limits.max_connections or 0)
        if excess > 0:
            others = [one for one in connections if one is not self and one._awaited[0]]
            if others:
                min(others, key=lambda one: one._since)._end("crowded")
            elif excess > SPARE_CONNECTIONS:
                self._end("crowded")
            else:
                self.app_state = {**self.app_state, "is_crowded": True}

    data_received = _and_watch(H11Protocol.data_received)
    on_response_complete = _and_watch(H11Protocol.on_response_complete)
    pause_writing = _and_watch(H11Protocol.pause_writing)
    resume_writing = _and_watch(H11Protocol.resume_writing)

    def timeout_keep_alive_handler(self) -> None:
        self._end("idle")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        """Start the clock anew when something else is awaited of the client."""
        if self.flow.write_paused or self.transport.is_closing():
            what = "read"
        elif self.timeout_keep_alive_task is not None:
            what = "idle"
        elif self.cycle is None or self.cycle.response_complete:
            what = "header"
        else:
            what = "body" if self.cycle.more_body else ""
        awaited = (what, self.cycle)
        if awaited == self._awaited:  # sending a little starts no clock
            return
        self._awaited, self._since = awaited, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds := self._seconds.get(what):
            self._timer = self.loop.call_later(seconds, self._end, what)

    def _end(self, reason: str) -> None:
        self._closed[reason] += 1
        if reason != "idle":
            _log.warning("closed a connection (%s)", reason)
        self.connections.discard(self)  # now, as others may come before it is lost
        self.transport.abort()


class Server(uvicorn.Server):
    """A server that ends when the requests that it has accepted have ended.

    After SIGTERM or Ctrl-C it listens on, so that what comes then is refused with a reason. A
    second signal ends it at once.
    """

    def __init__(self, app: FastAPI, engine: Engine, limits: ConnectionLimits | None = None):
        longest = engine.limits.max_request_s
        limits = limits or ConnectionLimits()
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws="none",
                lifespan="on",
                http=partial(_Connection, limits, app.state.closed),  # pyright: ignore
                timeout_keep_alive=limits.idle_s,  # pyright: ignore[reportArgumentType]
                # accepted at once, before a connection counts itself
                backlog=SPARE_CONNECTIONS,
                # a client that reads no more must not keep the process
                timeout_graceful_shutdown=math.ceil(longest) if math.isfinite(longest) else None,
            )
        )
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(1024)  # more may wait than are accepted at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._engine.is_stopping:
            self.should_exit = self.force_exit = True
            if self._loop is not None:  # from Python 3.12 on uvicorn waits for connections
                self._loop.call_soon_threadsafe(self._abort)
        self._engine.stop()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # pyright: ignore[reportOptionalMemberAccess]

    async def on_tick(self, counter: int) -> bool:
        if self._engine.is_stopping and self._engine.is_idle:
            self.should_exit = True
        return await super().on_tick(counter)


class OnceASecond(logging.Filter):
    """Lets each kind of message through once a second, as clients can cause any number of them."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind, now = str(record.msg).partition("\n")[0], time.monotonic()
        is_due = now >= self._next_s.get(kind, 0.0)
        if is_due:
            self._next_s[kind] = now + 1
        return is_due


def listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error}") from error


def _max_open_files() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 2048
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
