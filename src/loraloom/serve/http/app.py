"""The routes, and the numbers of `/metrics`."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from transformers import PreTrainedTokenizerBase

import loraloom
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.sequence import RequestError, Row, log_failure
from loraloom.serve.adapters import ServedAdapters
from loraloom.serve.http.answers import ChatExchange, TextExchange
from loraloom.serve.http.bridge import Backend
from loraloom.serve.http.guards import (
    LOADING,
    PAGES,
    AccessGuard,
    ErrorBody,
    OuterGuard,
    handle_errors,
)
from loraloom.serve.http.schemas import ChatBody, CompletionBody, LoadBody, UnloadBody

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 413, 422, 429, 500, 503, 504, 507)
}
_STATIC = Path(__file__).parent.parent / "static"
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Name of a counter -> what it counts, and its labels.
_COUNTERS: dict[str, tuple[str, list[str]]] = {
    "steps": ("Steps of the engine.", []),
    "preemptions": ("Rows sent back to the queue for others.", []),
    "prompt_tokens": ("Tokens of prompts.", ["model"]),
    "prompt_tokens_cached": ("Those known from prompts before.", ["model"]),
    "generated_tokens": ("Tokens that were chosen.", ["model"]),
    "http_responses": ("Answers.", ["path", "status"]),
    "closed_connections": ("Closed on slow clients.", ["reason"]),
    "requests": ("Requests that have ended.", ["model", "outcome"]),
    "expert_tokens": (
        "How often a mixture's experts were chosen, in one of 16 decoding steps.",
        ["model", "router", "expert"],
    ),
}
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class ApiOptions:
    """What the API allows."""

    api_keys: Sequence[str] = field(default=(), repr=False)  # none for no keys
    admin_keys: Sequence[str] = field(default=(), repr=False)  # to load and unload adapters
    allow_loading: bool = False
    adapter_root: Path | None = None  # load from below this directory alone, not from the Hub
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 2 << 20
    is_local: bool = True  # only this machine reaches the server
    log_requests: bool = False


def create_app(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    adapters: ServedAdapters,
    options: ApiOptions | None = None,
) -> FastAPI:
    options = options or ApiOptions()
    backend = Backend(engine, adapters, copy.deepcopy(tokenizer))

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
    _add_models(app, backend)
    _add_health(app, engine, metrics)
    for path, (name, kind) in PAGES.items():
        page = _page((_STATIC / name).read_bytes(), kind)
        app.get(path, include_in_schema=False)(page)

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await ChatExchange(backend, body, request).respond()

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        return await TextExchange(backend, body, request).respond()

    if options.allow_loading:
        _add_loading(app, adapters, options.adapter_root)
    return app


def _page(content: bytes, kind: str) -> Callable[[], Response]:
    return lambda: Response(content, media_type=kind, headers=_PAGE_HEADERS)


def _middleware(options: ApiOptions, answers: Counter[tuple[str, int]]) -> list[Middleware]:
    """What a request goes through first, from the outside in."""
    is_local, is_written = options.is_local, options.log_requests
    outer = Middleware(OuterGuard, answers=answers, is_local=is_local, is_written=is_written)
    # preflight requests have no keys; OpenAI's client sends some headers of its own
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(options.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    keys, admin_keys = options.api_keys, options.admin_keys
    access = Middleware(
        AccessGuard, keys=keys, admin_keys=admin_keys, max_bytes=options.max_body_bytes
    )
    return [outer, cors, access] if options.cors_origins else [outer, access]


def _add_models(app: FastAPI, backend: Backend) -> None:
    base, started = backend.adapters.base_name, int(time.time())

    def describe(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "loraloom",
            "root": base,
            "parent": parent,
            "max_model_len": backend.engine.max_length,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Name the base model and its adapters."""
        data = [describe(base, None), *(describe(name, base) for name in backend.adapters.names())]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model:path}", response_model=Model)
    async def retrieve_model(model: str) -> Response:
        """Describe a model."""
        for found in (await list_models())["data"]:
            if found["id"] == model:
                return JSONResponse(found)
        message = f"the model {shown(model)} does not exist"
        raise RequestError(message, "model_not_found", param="model")


def _add_health(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:  # needs no thread: those may all be busy
        """Say that the process lives."""
        return "ok"

    @app.get("/ready", response_class=PlainTextResponse)
    async def ready() -> str:
        """Say whether requests are taken."""
        if engine.is_stopping:
            raise RequestError("the server is stopping", "stopping")
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    def read_metrics() -> Response:
        """Tell numbers to Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_loading(app: FastAPI, adapters: ServedAdapters, root: Path | None) -> None:
    load_path, unload_path = LOADING

    @app.post(load_path, response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadBody) -> str:
        """Load an adapter from a directory of the server, or from the Hub."""
        source = body.lora_path if root is None else find_below(root, body.lora_path)
        if source is None:  # whatever is elsewhere
            raise RequestError(
                "lora_path must be the directory of an adapter below the server's --adapter-root, "
                f"got {shown(body.lora_path)}",
                param="lora_path",
            )
        try:
            await adapters.load(body.lora_name, source, replace=body.load_inplace)
        except (FormatError, AdapterError) as error:
            log_failure(f"adapter {body.lora_name!r} could not be loaded", error)
            # where files are is the server's business
            message = str(error).replace(source, body.lora_path)
            message = re.sub(r"(?<![\w.])/(?:[^\s/:'\"`]+/)+", "…/", message)
            raise RequestError(message) from None
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post(unload_path, response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadBody) -> str:
        """Let an adapter go when the requests that use it have ended."""
        adapters.unload(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def find_below(root: Path, text: str) -> str | None:
    """Find a directory below another one; None if there is none, or links lead out of it."""
    root = root.resolve()
    try:
        path = (root / text).resolve(strict=True)
        files = [path, *(file.resolve() for file in path.iterdir())]
    except (OSError, RuntimeError, ValueError):  # a file, a circle of links, no path at all
        return None
    return str(path) if all(file.is_relative_to(root) for file in files) else None


class Metrics(Collector):
    """The numbers of a server, which Prometheus reads."""

    def __init__(self, engine: Engine):
        self.answers: Counter[tuple[str, int]] = Counter()
        """Answers of the server by path and status."""
        self.closed: Counter[str] = Counter()
        """Connections that the server closed, by reason."""
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)
        histogram = partial(
            Histogram, labelnames=["model"], registry=self._registry, buckets=_SECONDS
        )
        self._first_token = histogram(
            "loraloom_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._whole = histogram("loraloom_request_seconds", "From a request's arrival to its end.")
        engine.on_end = self._observe

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _observe(self, row: Row) -> None:
        self._whole.labels(row.owner).observe(row.seconds)
        if row.first_token_s is not None:
            self._first_token.labels(row.owner).observe(row.first_token_s - row.request.arrived_s)

    def collect(self) -> Iterator[Any]:
        engine, counts = self._engine, self._engine.counts
        for name, text, value in (
            ("requests_running", "Completions that are being made.", engine.num_running),
            ("requests_waiting", "Requests that wait.", engine.num_waiting),
            ("cache_tokens", "Size of the key-value cache.", engine.limits.cache_tokens),
            ("cache_tokens_used", "Tokens of it that rows use.", engine.cache_tokens_in_use),
            ("cache_tokens_kept", "Tokens of prompts kept for others.", engine.prefix_tokens),
        ):
            yield GaugeMetricFamily(f"loraloom_{name}", text, value)
        kept: dict[str, dict[Any, int]] = {"http_responses": self.answers.copy()}
        kept["closed_connections"] = {(reason,): n for reason, n in self.closed.copy().items()}
        for (name, *labels), number in counts.copy().items():
            kept.setdefault(name, {})[tuple(labels)] = number
        for name, (text, labels) in _COUNTERS.items():
            family = CounterMetricFamily(f"loraloom_{name}", text, labels=labels)
            for key, number in kept.get(name, {} if labels else {(): 0}).items():
                family.add_metric(list(map(str, key)), number)
            yield family
