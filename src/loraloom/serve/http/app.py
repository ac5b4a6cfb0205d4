"""The routes, and the numbers of `/metrics`."""

import asyncio
import copy
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator, Set
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.middleware.cors import CORSMiddleware
from transformers import PreTrainedTokenizerBase

import loraloom
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.request import RequestError, Row
from loraloom.serve.adapter_cache import SUM, ServedAdapters, unknown_model
from loraloom.serve.http.bodies import PreparedRoute
from loraloom.serve.http.completions import ChatExchange, TextExchange
from loraloom.serve.http.exchange import Backend
from loraloom.serve.http.guards import (
    LOADING,
    MODEL,
    PAGES,
    TENANT,
    AccessGuard,
    ApiOptions,
    handle_errors,
)
from loraloom.serve.http.schemas import ChatBody, CompletionBody, LoadBody, UnloadBody

_log = logging.getLogger(__name__)
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
# Labels of counters that have others than the model's name.
_LABELS = {
    "steps": [],
    "preemptions": [],
    "closed_connections": ["reason"],
    "requests": ["model", "outcome"],
    "http_responses": ["path", "status"],
}
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def create_app(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    adapters: ServedAdapters,
    options: ApiOptions,
) -> FastAPI:
    backend = Backend(engine, adapters, copy.deepcopy(tokenizer), options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend.loop = asyncio.get_running_loop()
        thread = threading.Thread(target=engine.run, name="loraloom-engine", daemon=True)
        thread.start()
        yield
        engine.stop()
        await run_in_threadpool(thread.join)
        backend.grammars.close()

    app = FastAPI(
        title="loraloom",
        version=loraloom.__version__,
        lifespan=lifespan,
        docs_url=None,  # whose pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # redirects know no proxy
    )
    app.state.preparations = backend.preparations
    app.router.route_class = PreparedRoute
    # what comes last stands outermost
    app.add_middleware(AccessGuard, options=options)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,  # preflight requests have no keys
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends some of its own
        )
    handle_errors(app)
    for path, name in PAGES.items():
        page = partial(FileResponse, _STATIC / name, headers=_PAGE_HEADERS)
        app.add_route(path, lambda _, page=page: page())

    _add_models(app, adapters, engine.max_length)
    _add_status(app, adapters, Metrics(engine, adapters))

    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await ChatExchange(backend, body, request).respond()

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        return await TextExchange(backend, body, request).respond()

    if options.allow_loading:
        _add_loading(app, adapters, options.adapter_root)
    return app


def _add_models(app: FastAPI, adapters: ServedAdapters, max_length: int) -> None:
    base = adapters.base_name
    model: dict[str, Any] = {
        "object": "model",
        "created": int(time.time()),
        "root": base,
        "owned_by": "loraloom",
        "max_model_len": max_length,
    }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the base model and its adapters."""
        models = [{**model, "id": name, "parent": None} for name in adapters.base_names]
        for name in await adapters.names():
            loaded = adapters.loaded(name)
            revision = None if loaded is None else loaded.revision
            status = {"loaded": loaded is not None, "revision": revision}
            models.append({**model, "id": name, "parent": base, **status})
        return {"object": "list", "data": models}

    @app.get("/v1/models/{model:path}", response_model=Model)
    async def retrieve_model(model: str) -> Response:
        """Describe one model."""
        for entry in (await list_models())["data"]:
            if entry["id"] == model:
                return JSONResponse(entry)
        raise unknown_model(model)


def _add_status(app: FastAPI, adapters: ServedAdapters, metrics: "Metrics") -> None:
    @app.head("/ready", include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.get("/ready", response_class=PlainTextResponse)
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:  # needs no thread: those may all be busy
        """Report that the server accepts requests."""
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def read_metrics() -> str:
        """Return metrics for Prometheus."""
        names = {*await adapters.names(), *adapters.names_in_use()}
        metrics.keep({adapters.base_name, SUM, *names})
        return (await run_in_threadpool(generate_latest, metrics.registry)).decode()


def _add_loading(app: FastAPI, adapters: ServedAdapters, root: Path | None) -> None:
    load_path, unload_path = LOADING

    @app.post(load_path, response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadBody, request: Request) -> str:
        """Load an adapter; requires --allow-loading."""
        source = body.lora_path if root is None else find_below(root, body.lora_path)
        if source is None:  # whatever is elsewhere
            raise RequestError(
                "lora_path must be the directory of an adapter below the server's --adapter-root, "
                f"got {shown(body.lora_path)}",
                param="lora_path",
            )
        try:
            sender = _sender(request, body.lora_name)
            await adapters.load(body.lora_name, source, replace=body.load_inplace, sender=sender)
        except (FormatError, AdapterError) as error:
            _log.info("adapter %r can't be loaded: %s", body.lora_name, error)
            # where files are is the server's business
            message = str(error).replace(source, body.lora_path)
            message = re.sub(r"(?<![\w.])/(?:[^\s/:'\"`]+/)+", "…/", message)
            raise RequestError(message) from None
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post(unload_path, response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadBody, request: Request) -> str:
        """Unload an adapter after the requests that use it."""
        await adapters.unload(body.lora_name, _sender(request, body.lora_name))
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def _sender(request: Request, name: str) -> str:
    """Say who loads or unloads an adapter, and which, for the log."""
    request.scope[MODEL] = name
    return f"key {request.scope[TENANT][:8]}" if TENANT in request.scope else "a client"


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

    def __init__(self, engine: Engine, adapters: ServedAdapters):
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._engine = engine
        self._adapters = adapters
        histogram = partial(
            Histogram, labelnames=["model"], registry=self.registry, buckets=_SECONDS
        )
        self._first_token = histogram(
            "loraloom_time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self._whole = histogram("loraloom_request_seconds", "From a request's arrival to its end.")
        self._observed: set[str] = set()
        engine.on_end = self._observe

    def keep(self, models: Set[str]) -> None:
        """Drop the numbers of models that are gone."""
        counts = self._engine.counts
        for name, *labels in list(counts):
            if "model" in _LABELS.get(name, ["model"]) and labels[0] not in models:
                counts.pop((name, *labels), None)
        for model in self._observed - models:
            self._observed.remove(model)
            self._whole.remove(model)
            self._first_token.remove(model)

    def _observe(self, row: Row) -> None:
        self._observed.add(row.owner)
        self._whole.labels(row.owner).observe(row.seconds)
        if row.first_token_s is not None:
            self._first_token.labels(row.owner).observe(row.first_token_s - row.request.arrived_s)

    def collect(self) -> Iterator[Any]:
        gauges = self._engine.gauges()
        gauges["requests_waiting"] += self._adapters.num_waiting
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"loraloom_{name}", name.replace("_", " "), value)
        families: dict[str, CounterMetricFamily] = {}
        for (name, *labels), number in self._engine.counts.copy().items():
            names = _LABELS.get(name, ["model"])
            family = CounterMetricFamily(f"loraloom_{name}", name, labels=names)
            families.setdefault(name, family).add_metric(labels, number)
        yield from families.values()
