"""What stands before the routes: who may ask, how much at once, and what the log keeps of it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections import Counter
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraloom.errors import shown
from loraloom.serve.access import is_loopback
from loraloom.serve.http.errors import ApiError
from loraloom.serve.http.playground import PAGES

HEALTH = ("/health", "/ready")
_OPEN = (*HEALTH, *PAGES)
"""Paths that need no key."""
LOADING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths that need an admin's key, where there are any."""
_PATHS = {
    *_OPEN, *LOADING, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions",
}  # fmt: skip
"""Those that are counted apart."""
TENANT = "loraloom.tenant"
"""Where a request's scope says with which key it came, as a hash."""
_log = logging.getLogger("loraloom.access")


class RequestLog:
    """Counts all answers by path and status, and writes a line of each; the outermost guard.

    Routes leave what they know of a request in its state: `model`, `num_prompt`, `num_new`.
    """

    def __init__(self, app: ASGIApp, answers: Counter[tuple[str, int]], is_written: bool):
        self._app = app
        self._answers = answers
        self._is_written = is_written

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and note the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start, state = 499, time.perf_counter(), scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        app = self._app
        if state.get("is_crowded") and scope["path"] not in HEALTH:
            app = ApiError(
                503,
                "the server has too many connections; try again later",
                code="crowded",
                headers={"Retry-After": "1", "Connection": "close"},
            ).response()
        try:
            await app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"]
            self._answers[path if path in _PATHS else "other", status] += 1
            if self._is_written:
                _log.info(
                    "%s %s %d model=%s key=%s tokens=%d+%d ms=%.0f",
                    scope["method"],
                    path if path in _PATHS else shown(path),
                    status,
                    shown(state["model"]) if "model" in state else "-",
                    scope.get(TENANT, "-")[:8],
                    state.get("num_prompt", 0),
                    state.get("num_new", 0),
                    1000 * (time.perf_counter() - start),
                )


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
    """Lets requests with one of the keys through; those that load adapters need an admin's.

    All keys are compared, each in constant time, so that the time says nothing about them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str]):
        self._app = app
        self._is_open = not keys
        self._admins = [_digest(key.encode()) for key in admin_keys]
        self._users = [*self._admins, *(_digest(key.encode()) for key in keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        error = self._check(scope) if scope["type"] == "http" else None
        await (self._app if error is None else error.response())(scope, receive, send)

    def _check(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip()) if kind.lower() == b"bearer" else b""
        is_user, is_admin = _matches(given, self._users), _matches(given, self._admins)
        if is_user:
            scope[TENANT] = given.hex()
        if (
            scope["path"] in LOADING
            and self._admins
            and not is_admin
            and (is_user or self._is_open)
        ):
            return ApiError(
                403, "only an admin's key of this server may load adapters", code="not_an_admin"
            )
        if is_user or self._is_open or scope["path"] in _OPEN:
            return None
        return ApiError(
            401,
            "the request needs a header `Authorization: Bearer KEY` with a key of this server",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _matches(given: bytes, digests: Sequence[bytes]) -> bool:
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
