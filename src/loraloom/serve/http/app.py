"""The routes."""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from transformers import PreTrainedTokenizerBase

import loraloom
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.sequence import log_failure
from loraloom.serve.access import find_below
from loraloom.serve.adapters import AdapterShelf
from loraloom.serve.http.asking import Backend, now
from loraloom.serve.http.chat import complete_chat
from loraloom.serve.http.completions import complete_texts
from loraloom.serve.http.errors import ApiError, ErrorBody, api_error, handle_errors
from loraloom.serve.http.guards import LOADING, BodyLimit, HostCheck, KeyCheck, RequestLog
from loraloom.serve.http.metrics import Metrics
from loraloom.serve.http.objects import ChatBody, CompletionBody, LoadBody, UnloadBody
from loraloom.serve.http.playground import add_playground

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The request is wrong",
        401: "The key is wrong",
        403: "The key is no admin's",
        404: "There is no such model",
        413: "The body is too large",
        422: "Not given",
        429: "Too many requests wait",
        500: "The server failed",
        503: "The server is stopping",
        504: "It took too long",
        507: "Adapters take too much memory",
    }.items()
}


@dataclass(frozen=True)
class ApiOptions:
    """What the API allows.

    Args:
        api_keys: A request must have one of them, or an admin's; none for no keys.
        admin_keys: Requests that load and unload adapters must have one of them; none for all.
        allow_loading: Clients may load and unload adapters.
        adapter_root: Load from directories below this one alone; None for any, and for the Hub.
        cors_origins: Web pages that may ask.
        max_body_bytes: Most bytes of a request.
        is_local: Only this machine reaches the server.
        log_requests: Write a line of each request.
    """

    api_keys: Sequence[str] = field(default=(), repr=False)
    admin_keys: Sequence[str] = field(default=(), repr=False)
    allow_loading: bool = False
    adapter_root: Path | None = None
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 2 << 20
    is_local: bool = True
    log_requests: bool = False


def create_app(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    shelf: AdapterShelf,
    options: ApiOptions | None = None,
) -> FastAPI:
    """Make the application; the engine runs in a thread of its own while it is up."""
    options = options or ApiOptions()
    backend = Backend(engine, shelf, copy.deepcopy(tokenizer))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread = threading.Thread(target=engine.run, name="loraloom-engine", daemon=True)
        thread.start()
        yield
        engine.stop()
        await run_in_threadpool(thread.join)

    metrics = Metrics(engine)
    app = FastAPI(
        title="loraloom",
        version=loraloom.__version__,
        lifespan=lifespan,
        middleware=_middleware(options, metrics.answers),
        responses=_ERRORS,
    )
    app.state.closed = metrics.closed
    handle_errors(app)
    _add_completions(app, backend)
    _add_models(app, backend)
    _add_health(app, engine, metrics)
    add_playground(app)
    if options.allow_loading:
        _add_loading(app, shelf, options.adapter_root)
    return app


def _add_completions(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await complete_chat(backend, body, request)

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        return await complete_texts(backend, body, request)


def _add_models(app: FastAPI, backend: Backend) -> None:
    started = now()

    def describe(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "loraloom",
            "root": backend.shelf.base_name,
            "parent": parent,
            "max_model_len": backend.engine.max_length,
        }

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        """Name the base model and its adapters."""
        base = backend.shelf.base_name
        rows = [(base, None), *((name, base) for name in backend.shelf.names())]
        return {"object": "list", "data": [describe(*row) for row in rows]}

    @app.get("/v1/models/{model:path}", response_model=Model)
    def retrieve_model(model: str) -> Response:
        """Describe a model."""
        found = next((one for one in list_models()["data"] if one["id"] == model), None)
        if found is None:
            raise ApiError(
                404,
                f"the model {shown(model)} does not exist",
                code="model_not_found",
                param="model",
            )
        return JSONResponse(found)


def _add_health(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:  # needs no thread: those may all be busy
        """Say that the process lives."""
        return "ok"

    @app.get("/ready", response_class=PlainTextResponse)
    async def ready() -> str:
        """Say whether requests are taken."""
        if engine.is_stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    def read_metrics() -> Response:
        """Tell numbers to Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_loading(app: FastAPI, shelf: AdapterShelf, root: Path | None) -> None:
    load_path, unload_path = LOADING

    @app.post(load_path, response_class=PlainTextResponse)
    def load_lora_adapter(body: LoadBody) -> str:
        """Load an adapter from a directory of the server, or from the Hub."""
        source = body.lora_path if root is None else find_below(root, body.lora_path)
        if source is None:  # whatever is elsewhere
            raise ApiError(
                400,
                "lora_path must be the directory of an adapter below the server's --adapter-root, "
                f"got {shown(body.lora_path)}",
                param="lora_path",
            )
        try:
            shelf.load(body.lora_name, source, replace=body.load_inplace)
        except (FormatError, AdapterError) as error:
            log_failure(f"adapter {body.lora_name!r} could not be loaded", error)
            raise _without_paths(error, source, body.lora_path) from None
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post(unload_path, response_class=PlainTextResponse)
    def unload_lora_adapter(body: UnloadBody) -> str:
        """Let an adapter go when the requests that use it have ended."""
        shelf.unload(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _without_paths(error: Exception, source: str, given: str) -> ApiError:
    """An adapter's fault as the client may know it: where files are is the server's business."""
    status = 400 if isinstance(error, FormatError) else api_error(error).status
    message = str(error).replace(source, given)
    return ApiError(status, re.sub(r"(?<![\w.])/(?:[^\s/:'\"`]+/)+", "…/", message))


def _middleware(options: ApiOptions, answers: Counter[tuple[str, int]]) -> list[Middleware]:
    """What a request goes through first, from the outside in."""
    layers = [Middleware(RequestLog, answers=answers, is_written=options.log_requests)]
    layers += [Middleware(HostCheck)] if options.is_local else []
    if options.cors_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(options.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's client sends some of its own
            )
        )
    if options.api_keys or options.admin_keys:
        keys = {"keys": options.api_keys, "admin_keys": options.admin_keys}
        layers.append(Middleware(KeyCheck, **keys))
    return [*layers, Middleware(BodyLimit, max_bytes=options.max_body_bytes)]
