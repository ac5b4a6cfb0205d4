"""What stands before the routes: who may ask, and how much at once.

Errors are objects as OpenAI's clients expect them, with a status code that fits.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, LoraloomError, plain, shown
from loraloom.generation.request import RequestError
from loraloom.serve.process import is_loopback

# Pages of the playground and health hold nothing of the server's, and need no key.
PAGES = {
    "/": "playground.html",
    "/playground.css": "playground.css",
    "/playground.js": "playground.js",
}
_OPEN = ("/health", "/ready", *PAGES)
# Paths that need an admin's key, where there are any.
LOADING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
MAX_BODY_BYTES = 2 << 20
# Where a request's scope says with which key it came, as a hash.
TENANT = "loraloom.tenant"
# And its `Usage`, if it asks for completions.
USAGE = "loraloom.usage"
# And which model it names.
MODEL = "loraloom.model"
# Code of an error -> status; 400 for others.
_STATUS = {
    "model_not_found": 404,
    "queue_full": 429,
    "client_gone": 499,
    "broken_adapter": 500,
    "timeout": 504,
    "adapter_memory": 507,
}


@dataclass(frozen=True)
class ApiOptions:
    """What the API allows."""

    # keys are looked up for each request, so that lists may change; none for no keys
    api_keys: Sequence[str] = field(default=(), repr=False)
    admin_keys: Sequence[str] = field(default=(), repr=False)  # to load and unload adapters
    allow_loading: bool = False
    adapter_root: Path | None = None  # load from below this directory alone, not from the Hub
    cors_origins: Sequence[str] = ()
    host: str = "127.0.0.1"  # listened on; perhaps an address that only this machine reaches
    allow_control_tokens: bool = False  # in messages, where they are text otherwise
    allowed_hosts: Sequence[str] = ()  # further names by which clients may call the server
    tool_form: PromptForm | None = None  # with tools, unless an adapter has a template


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 429:
        kind, headers = "rate_limit_error", {"Retry-After": "5"}
    error = {"message": plain(message), "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


def answer_to(error: Exception) -> JSONResponse:
    match error:
        case RequestError(code=code, param=param):
            return error_response(_STATUS.get(code or "", 400), str(error), code, param)
        case AdapterError():  # its weights have diverged
            return error_response(500, str(error), "broken_adapter")
        case LoraloomError():
            return error_response(400, str(error))
        case HTTPException(status_code=status, detail=detail, headers=headers):
            return error_response(status, str(detail), headers=headers)
        case RequestValidationError():  # no JSON, as its header says
            return error_response(
                400, "the body must be JSON, sent as Content-Type: application/json"
            )
    return error_response(500, "the server failed at this request; see its log", "internal")


def handle_errors(app: FastAPI) -> None:
    for kind in (LoraloomError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, lambda request, error: answer_to(error))


class AccessGuard:
    """Lets requests with one of the keys through (an admin's, to load), of at most `max_bytes`."""

    # All keys are compared, each in constant time, so that the time says nothing about them.

    def __init__(self, app: ASGIApp, options: ApiOptions):
        self._app = app
        self._options = options  # whose keys change when their files are read again
        # a web page may have its own name lead to this machine, which would be asked for by it
        self._hosts: list[str] = []
        if is_loopback(options.host) or options.allowed_hosts:
            self._hosts += ["localhost", "127.0.0.1", "[::1]", options.host]
            self._hosts += options.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:  # whatever size the headers claim
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                text = f"a request may have at most {MAX_BODY_BYTES:,} bytes; shorten the request"
                raise HTTPException(413, text)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        address = headers.get(b"host", b"").decode("latin-1").lower()
        host = re.sub(r":\d*$", "", address)
        # `*.NAME` allows what ends by `.NAME`
        suffixes = tuple(name[1:] for name in self._hosts if name.startswith("*."))
        if self._hosts and host not in self._hosts and not host.endswith(suffixes):
            names = ", ".join(dict.fromkeys(self._hosts))
            return error_response(400, f"the Host header must be of {names}, got {shown(host)}")
        if {b"content-length", b"transfer-encoding"} <= headers.keys():
            message = "a request must not have both Content-Length and Transfer-Encoding"
            return error_response(400, message, headers={"Connection": "close"})
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(key.strip()) if kind.lower() == b"bearer" else b""
        options = self._options
        is_admin = _is_among(digest, options.admin_keys)
        is_user = _is_among(digest, options.api_keys) or is_admin
        if is_user:
            scope[TENANT] = digest.hex()
        if options.api_keys and not is_user and scope["path"] not in _OPEN:
            return error_response(
                401,
                "the request needs a header `Authorization: Bearer KEY` with a key of this server",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["path"] in LOADING and options.admin_keys and not is_admin:
            message = "only an admin's key of this server may load adapters"
            return error_response(403, message, "not_an_admin")
        return None


def _is_among(digest: bytes, keys: Sequence[str]) -> bool:
    return True in [hmac.compare_digest(digest, _digest(key.encode())) for key in keys]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
