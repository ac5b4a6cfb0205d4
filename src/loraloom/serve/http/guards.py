"""What stands before the routes: who may ask, and how much at once."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraloom.errors import shown
from loraloom.serve.access import is_loopback
from loraloom.serve.http.errors import ApiError
from loraloom.serve.http.playground import PAGES

_OPEN = ("/health", "/ready", *PAGES)
"""Paths that need no key."""
TENANT = "loraloom.tenant"
"""Where a request's scope says with which of the keys it came."""


class HostCheck:
    """Refuses requests that call this machine by a foreign name.

    A web page may have its own name lead to this machine, and would then be asked for by it.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if not is_loopback(name.strip("[]").lower()):
                error = ApiError(400, f"this server must be called localhost, got {shown(host)}")
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses requests of more than `max_bytes`, whatever size they claim."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on and count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or len(said) > 18 or int(said) > self._max_bytes:
            await self._error().response()(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, str(self._error()))
            return message

        await self._app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"a request may have at most {self._max_bytes:,} bytes; shorten it")


class KeyCheck:
    """Lets requests with one of the keys through.

    All keys are compared, each in constant time, so that the time says nothing about them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        key = self._key_of(scope) if scope["type"] == "http" else None
        if scope["type"] == "http" and scope["path"] not in _OPEN and key is None:
            error = ApiError(
                401,
                "the request needs a header `Authorization: Bearer KEY` with a key of this server",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        scope[TENANT] = str(key)
        await self._app(scope, receive, send)

    def _key_of(self, scope: Scope) -> int | None:
        """The place of the request's key among those of the server."""
        headers = dict(scope["headers"])
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return matches.index(True) if kind.lower() == b"bearer" and any(matches) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
