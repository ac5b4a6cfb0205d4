"""The process that listens, and how it ends."""

from __future__ import annotations

import asyncio
import math
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from loraloom.errors import ConfigError
from loraloom.serve.engine import Engine


class Server(uvicorn.Server):
    """A server that ends when the requests that it has accepted have ended.

    After SIGTERM or Ctrl-C it listens on, so that what comes then is refused with a reason. A
    second signal ends it at once.
    """

    def __init__(self, app: FastAPI, engine: Engine):
        longest = engine.limits.max_request_s
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                ws="none",
                lifespan="on",
                # a client that reads no more must not keep the process
                timeout_graceful_shutdown=math.ceil(longest) if math.isfinite(longest) else None,
            )
        )
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        if self._engine.is_stopping:
            self.should_exit = self.force_exit = True
            if self._loop is not None:  # from Python 3.12 on uvicorn waits for connections
                self._loop.call_soon_threadsafe(self._abort)
        self._engine.stop()

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # pyright: ignore[reportOptionalMemberAccess]

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is time to end."""
        if self._engine.is_stopping and self._engine.is_idle:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Open the socket; port 0 takes any free one."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error}") from error
