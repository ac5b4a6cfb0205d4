"""The process that listens. uvicorn bounds neither connections nor the time that a client takes to
send a request; here both are, so that clients that send nothing leave room for the others.
"""

import logging
import math
import os
import re
import secrets
import socket
import time
from collections import Counter
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

from loraloom.errors import ConfigError, shown
from loraloom.generation.engine import Engine
from loraloom.serve.http.guards import MODEL, TENANT, USAGE

_log = logging.getLogger(__name__)
# Seconds in which headers, and then a body, must have come, and some of an answer be read.
SECONDS = {"header": 10.0, "body": 60.0, "read": 60.0}
# Seconds without a request after which a connection is closed.
IDLE_S = 30
# Characters of a path and query that the log has.
_MAX_PATH = 200
# Connections that are accepted at once, before one of them counts itself.
_BACKLOG = 128


class _Connection(H11Protocol):
    """Knows what its client owes, and since when; of too many, the one silent longest goes."""

    def __init__(self, max_connections: int, counts: Counter[tuple[str, ...]], **settings: Any):
        super().__init__(**settings)
        self._max_connections = max_connections
        self._counts = counts
        self._awaited: tuple[Any, ...] = ()
        self._since = 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.watch()  # it is the latest, however many come between two ticks
        connections: set[Any] = self.connections
        if len(connections) > self._max_connections:
            silent = [connection for connection in connections if connection.watch()]
            min(silent, key=lambda connection: connection._since).end("crowded")

    def watch(self) -> str:
        """Say what is awaited of the client, and note when that changes."""
        num_unread = self.transport.get_write_buffer_size()
        if self.flow.write_paused or self.transport.is_closing():
            phase = "read"
        elif self.timeout_keep_alive_task is not None:
            phase = "idle"
        elif self.cycle is None or self.cycle.response_complete:
            phase = "header"
        else:
            phase = "body" if self.cycle.more_body else ""
        awaited = (phase, self.cycle, num_unread)
        if awaited != self._awaited:  # sending a little of a request changes nothing
            self._awaited = awaited
            self._since = self.loop.time()
        return phase

    def end_if_slow(self) -> None:
        phase = self.watch()
        if self.loop.time() - self._since > SECONDS.get(phase, math.inf):
            self.end(phase)

    def end(self, reason: str) -> None:
        self._counts["closed_connections", reason] += 1
        self.connections.discard(self)  # now, as others may come before it is lost
        self.transport.abort()


class _AccessLog:
    """Counts answers, and logs a line for each that has ended: who asked, and for how much."""

    def __init__(self, app: ASGIApp, counts: Counter[tuple[str, ...]]):
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun_s = time.monotonic()
        status = "unanswered"
        request_id = _request_id(scope)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                path = getattr(scope.get("route"), "path", "other")
                self._counts["http_responses", path, status] += 1
                header = (b"x-request-id", request_id.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            path = get_path_with_query_string(scope)  # ty: ignore[invalid-argument-type]
            if len(path) > _MAX_PATH:
                path = f"{path[:_MAX_PATH]}…"
            client = get_client_addr(scope)  # ty: ignore[invalid-argument-type]
            details = [f"{time.monotonic() - begun_s:.2f} s", f"request {request_id}"]
            if TENANT in scope:
                details.append(f"key {scope[TENANT][:8]}")
            if MODEL in scope:
                details.append(f"model {shown(scope[MODEL])}")
            if USAGE in scope:
                usage = scope[USAGE].as_fields()
                tokens = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
                details.append(tokens)
            request = f"{scope['method']} {path}"
            _log.info('%s "%s" %s, %s', client, request, status, ", ".join(details))


def _request_id(scope: Scope) -> str:
    """Take the ID that a client or proxy has given a request, if it is short and safe to log."""
    sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    if re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", sent):
        return sent
    return f"req_{secrets.token_hex(16)}"


class Server(uvicorn.Server):
    """Ends when the requests that it has accepted have ended; a second signal ends it at once."""

    def __init__(self, app: FastAPI, engine: Engine):
        connection = partial(_Connection, max_connections(), engine.counts)
        super().__init__(
            uvicorn.Config(
                _AccessLog(app, engine.counts),
                log_config=None,
                access_log=False,
                log_level="error",
                ws="none",
                lifespan="on",
                http=connection,  # ty: ignore[invalid-argument-type]
                timeout_keep_alive=IDLE_S,
                backlog=_BACKLOG,
                # a client that reads no more must not keep the process
                timeout_graceful_shutdown=engine.limits.max_request_s,  # ty: ignore[invalid-argument-type]
            )
        )

    async def on_tick(self, counter: int) -> bool:
        for connection in list(self.server_state.connections):
            connection.end_if_slow()  # ty: ignore[missing-union-attribute]
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would raise the signal again at the end, which is no success
        if self.should_exit:
            os._exit(130)  # Python's own end would meet the engine in the middle of a step
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error}") from error


def max_connections() -> int:
    """As many as fit the limit of open files beside the rest, but no more than 1024."""
    try:
        import resource
    except ImportError:  # Windows
        return 1024
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1024 if soft == resource.RLIM_INFINITY else min(1024, max(1, soft * 3 // 4))
