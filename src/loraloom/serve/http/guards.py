"""What stands before the routes: who may ask, how much at once, and what the log keeps of it.

Errors are objects as OpenAI's clients expect them, with a status code that fits.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai.types.shared import ErrorObject
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraloom.errors import FormatError, LoraloomError, plain, shown
from loraloom.generation.sequence import RequestError
from loraloom.serve.process import is_loopback

HEALTH = ("/health", "/ready")
# Path of the playground -> file and kind. They hold nothing of the server's, and need no key.
PAGES = {
    "/": ("playground.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
# Paths that need an admin's key, where there are any.
LOADING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_OPEN = (*HEALTH, *PAGES)
# Those that are counted apart.
_PATHS = {
    *_OPEN, *LOADING, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions",
}  # fmt: skip
# Where a request's scope says with which key it came, as a hash.
TENANT = "loraloom.tenant"
# Code of an error -> status; 400 for others.
_STATUS = {
    "model_not_found": 404,
    "queue_full": 429,
    "busy_downloading": 429,
    "client_gone": 499,
    "broken_adapter": 500,
    "stopping": 503,
    "timeout": 504,
    "adapter_memory": 507,
}
_log = logging.getLogger("loraloom.access")


class ErrorBody(BaseModel):
    """The body of every response that is no success."""

    error: ErrorObject


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = "rate_limit_error" if status == 429 else kind
    error = {"message": plain(message), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, dict(headers or {}))


def answer_to(error: Exception) -> JSONResponse:
    match error:
        case RequestError(code=code, retry_after_s=seconds):
            headers = {"Retry-After": str(seconds)} if seconds else None
            status = _STATUS.get(code or "", 400)
            return error_response(status, str(error), code, error.param, headers)
        case FormatError():  # no client's fault
            pass
        case LoraloomError():
            return error_response(400, str(error))
    return error_response(500, "the server failed at this request; its log says why", "internal")


def handle_errors(app: FastAPI) -> None:

    def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    def of_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(step) for step in first["loc"][1:])
        if first["type"] == "json_invalid":
            return error_response(400, f"the body must be JSON: {first['ctx']['error']}")
        return error_response(400, f"{param or 'the body'}: {first['msg']}", param=param)

    for kind in (LoraloomError, Exception):
        app.add_exception_handler(kind, lambda request, error: answer_to(error))
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_body)


@dataclass
class OuterGuard:
    """Refuses crowds and foreign host names, counts all answers, and writes a line of each.

    Routes leave what they know of a request in its state: `model`, `num_prompt`, `num_new`.
    """

    app: ASGIApp
    answers: Counter[tuple[str, int]]
    is_local: bool
    is_written: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start, state = 499, time.perf_counter(), scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"]
            self.answers[path if path in _PATHS else "other", status] += 1
            if self.is_written:
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

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        if scope["state"].get("is_crowded") and scope["path"] not in HEALTH:
            message = "the server has too many connections; try again later"
            headers = {"Retry-After": "1", "Connection": "close"}
            return error_response(503, message, "crowded", headers=headers)
        # a web page may have its own name lead to this machine, which would be asked for by it
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.is_local and not is_loopback(name.strip("[]").lower()):
            return error_response(400, f"this server must be called localhost, got {shown(host)}")
        return None


class AccessGuard:
    """Lets requests with one of the keys through, and bodies of at most `max_bytes`.

    Requests that load adapters need an admin's key. All keys are compared, each in constant time,
    so that the time says nothing about them.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], admin_keys: Sequence[str], max_bytes: int
    ):
        self._app = app
        self._is_open = not keys
        self._admins = [_digest(key.encode()) for key in admin_keys]
        self._users = [*self._admins, *(_digest(key.encode()) for key in keys)]
        self._max_bytes = max_bytes
        self._too_large = f"a request may have at most {max_bytes:,} bytes; shorten it"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, dict(scope["headers"]))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:  # whatever size the headers claim
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> JSONResponse | None:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip()) if kind.lower() == b"bearer" else b""
        is_user, is_admin = _matches(given, self._users), _matches(given, self._admins)
        if is_user:
            scope[TENANT] = given.hex()
        if not (is_user or self._is_open or scope["path"] in _OPEN):
            message = "the request needs a header `Authorization: Bearer KEY` with a key of this "
            asks = {"WWW-Authenticate": "Bearer"}
            return error_response(401, f"{message}server", "invalid_api_key", headers=asks)
        if scope["path"] in LOADING and self._admins and not is_admin:
            message = "only an admin's key of this server may load adapters"
            return error_response(403, message, "not_an_admin")
        size = headers.get(b"content-length", b"0")
        if not size.isdigit() or len(size) > 18 or int(size) > self._max_bytes:
            return error_response(413, self._too_large)
        return None


def _matches(given: bytes, digests: Sequence[bytes]) -> bool:
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
