"""From what HTTP asks for to what the engine does, and back to the client as it comes."""

import asyncio
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.weighted_sum import Weighted, parse_sum, write_sum
from loraloom.config.fields import checked
from loraloom.data.tokens import name_of_token
from loraloom.errors import AdapterError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.request import (
    GenerationRequest,
    Piece,
    RequestError,
    Row,
    Share,
    log_failure,
)
from loraloom.generation.sampling import JsonConstraint, SamplingConfig, end_tokens
from loraloom.host.choice import Choice, describe_choice, is_routed
from loraloom.host.layout import RowAdapter
from loraloom.routing.record import describe_router
from loraloom.serve.adapter_cache import ServedAdapter, ServedAdapters, unknown_model
from loraloom.serve.http.grammars import GrammarCompiler
from loraloom.serve.http.guards import MODEL, TENANT, USAGE, ApiOptions, answer_to
from loraloom.serve.http.preparation import Preparations
from loraloom.serve.http.schemas import SamplingBody
from loraloom.serve.process import run_apart

# Seconds without an event after which a stream sends a comment, as proxies end what is silent.
COMMENT_S = 15.0
_Value = TypeVar("_Value")
_Queue = asyncio.Queue[tuple[int, Piece | Exception]]


@dataclass
class Backend:
    """The engine, the adapters, and a copy of the base model's tokenizer for HTTP's threads."""

    engine: Engine
    adapters: ServedAdapters
    tokenizer: PreTrainedTokenizerBase
    options: ApiOptions = field(default_factory=ApiOptions)
    loop: asyncio.AbstractEventLoop = field(init=False)
    preparations: Preparations = field(init=False)

    def __post_init__(self) -> None:
        limits = self.engine.limits
        self.preparations = Preparations(limits.max_rows + limits.max_waiting)
        # the first call ends tokenizer.json's truncation and padding, before other threads call
        self.tokenizer("a")

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in the event loop, from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client
            self.loop.call_soon_threadsafe(function, *arguments)

    @cached_property
    def token_text(self) -> Callable[[int], str]:
        return cache(partial(name_of_token, self.tokenizer))

    @cached_property
    def grammars(self) -> GrammarCompiler:
        # ids beyond the embedding are cut off
        size = max(self.engine.host.config.vocab_size, len(self.tokenizer))
        return GrammarCompiler(self.tokenizer, size, end_tokens(self.engine.host, self.tokenizer))

    async def acquire(self, model: str, tenant: str = "") -> tuple[ServedAdapter, RowAdapter]:
        """Begin to use the adapter that a model's name says, or a sum, as soon as it is there."""
        host = self.engine.host
        adapters = self.adapters
        if model == adapters.base_name:
            return ServedAdapter(model, tenant), None
        weighted = _weighted(model, adapters.base_name)
        # what is behind a slash is one of a routed adapter's own
        names = [name.partition("/")[0] for name, _ in weighted]
        if adapters.base_name in names:
            raise unknown_model(model)
        served = await self._acquire_all(names, model, tenant)
        row: list[tuple[str, float]] = []
        try:
            for used, (name, weight) in zip(served.adapters, weighted, strict=True):
                expert = name.removeprefix(used.name)
                if expert and expert[1:] not in host.adapters[used.host_name].members:
                    raise unknown_model(model)
                row.append((f"{used.host_name}{expert}", weight))
            if len(row) > 1:  # a large one takes longer than the event loop may
                await run_apart(host.adapter, write_sum(row))
        except BaseException as error:
            adapters.release(served)
            if isinstance(error, AdapterError):  # not of a kind that can be added up
                raise RequestError(str(error), param="model") from None
            raise
        if len(row) > 1:
            return served, tuple(row)
        name, weight = row[0]
        return served, name if weight == 1 else (name, weight)

    async def _acquire_all(self, names: list[str], model: str, tenant: str) -> ServedAdapter:
        if len(names) > 1:
            return await self.adapters.acquire_sum(names, tenant)
        try:
            return await self.adapters.acquire(names[0], tenant)
        except RequestError as error:
            if error.code != "model_not_found":
                raise
            raise unknown_model(model) from None  # all of what may be the name of a base model


def _weighted(model: str, base_name: str) -> Weighted:
    try:
        weighted = parse_sum(model)
    except AdapterError as error:
        raise RequestError(str(error), param="model") from None
    text = ""
    if any(abs(scale) > 10 for _, scale in weighted):
        text = "a scale behind a model's name must be from -10 to 10"
    elif base_name in {name for name, _ in weighted}:
        text = "scales and sums must be of adapters"
    if text:
        raise RequestError(f"{text}, got {shown(model)}", param="model")
    return weighted


@dataclass
class Usage:
    """Tokens of a request, which its scope holds without the request itself."""

    num_prompt: int = 0
    num_new: int = 0

    def as_fields(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self.num_new,
            "total_tokens": self.num_prompt + self.num_new,
        }


class Exchange(ABC):
    """A request for completions, and its answers while they are made; they end with its client."""

    kind: tuple[str, str, str]
    """The beginning of ids, the object of a whole answer and that of a chunk."""

    def __init__(self, backend: Backend, body: SamplingBody, http: Request):
        self.backend = backend
        names = backend.adapters.base_names
        # answers carry the base model's first name
        self.body = body.model_copy(update={"model": names[0]}) if body.model in names else body
        self.usage = Usage()
        self._tenant: str = http.scope.get(TENANT, "")
        self._arrived_s = time.monotonic()
        http.scope[USAGE] = self.usage
        http.scope[MODEL] = body.model
        self._constraint: JsonConstraint | None = None
        self._queue: _Queue = asyncio.Queue()
        self._rows: list[Row] = []
        self._told: set[int] = set()
        # nothing else reads from the connection while the engine works
        self._gone = asyncio.create_task(_until_disconnected(http.receive))
        self._gone.add_done_callback(self._cancel_rows)

    @abstractmethod
    def grammar(self) -> str | None:
        """What answers must keep to; written in a thread."""

    @abstractmethod
    async def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        """What the engine is asked for, made in pieces by `prepare`."""

    @abstractmethod
    def choice(self, index: int, answer: Piece) -> dict[str, Any]:
        """A whole answer; made in a thread."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The choice of the chunk in which a piece of an answer is told."""

    async def prepare(self, work: Callable[..., _Value], *arguments: object) -> _Value:
        """Do a piece of work in a thread, when it is the turn of who asks."""
        return await self.backend.preparations.run(self._tenant, partial(work, *arguments))

    async def choose(
        self, encode: Callable[[], list[int]], adapter: RowAdapter, owner: str
    ) -> Choice:
        """Let the engine's thread, which alone computes, choose what answers, if a router does."""
        engine = self.backend.engine
        if not is_routed(engine.host, adapter):
            return engine.host.choose([[]], [adapter])[0]
        prompt_ids = await self.prepare(encode)
        routing = engine.choose(prompt_ids, adapter, Share(self._tenant, owner))
        return await asyncio.wrap_future(routing)

    def told(self, index: int, piece: Piece) -> dict[str, Any]:
        """What routers did; once, which adapter answers and why, where one has chosen it."""
        fields: dict[str, Any] = {}
        if index not in self._told:
            self._told.add(index)
            fields |= describe_choice(self._rows[index].request.choice, self.backend.tokenizer)
        if self.body.routing:
            fields["routing"] = entries = []
            for text, choices in piece.routing:
                routers = []
                for choice in choices:
                    routers.append({**asdict(choice), "router": describe_router(choice.router)})
                entries.append({"text": text, "routers": routers})
        return fields

    def several(
        self, prompt: GenerationRequest, max_new_tokens: int | None
    ) -> list[GenerationRequest]:
        body = self.body
        room = max(1, self.backend.engine.max_length - len(prompt.prompt_ids))
        sampling = {
            "max_new_tokens": max_new_tokens or room,
            "temperature": body.temperature,
            "repetition_penalty": body.repetition_penalty,
            "seed": secrets.randbits(63) if body.seed is None else body.seed % 2**63,
            "stop": (body.stop,) if isinstance(body.stop, str) else body.stop or (),
        }
        if body.temperature > 0:  # else the most likely token is among those to draw from
            sampling |= {"top_k": body.top_k, "top_p": body.top_p}
        request = replace(
            prompt,
            tenant=self._tenant,
            arrived_s=self._arrived_s,
            sampling=checked(SamplingConfig, sampling),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias or {},
            ignore_end=body.ignore_eos,
            tells_routing=body.routing,
        )
        requests = [replace(request, place=number) for number in range(body.n)]
        if self._constraint is None:
            return requests
        return [replace(request, constraint=self._constraint.copy()) for request in requests]

    async def respond(self) -> Response:
        """Answer, or begin to; not for longer than requests take, or the client waits."""
        answer = asyncio.create_task(self._answer())
        limit_s = self.backend.engine.limits.max_request_s
        goes_on = False
        try:
            done, _ = await asyncio.wait(
                {answer, self._gone}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if answer in done:
                response = answer.result()
                goes_on = self.body.stream
                return response
            if self._gone in done:
                raise RequestError("the client has gone", "client_gone")
            raise RequestError(f"a request must end in {limit_s:g} seconds", "timeout")
        finally:
            answer.cancel()
            if not goes_on:
                self._gone.cancel()

    async def _answer(self) -> Response:
        await self._ask()
        prefix, answer, chunk = self.kind
        frame = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": chunk if self.body.stream else answer,
            "created": int(time.time()),
            "model": self.body.model,
        }
        if self.body.stream:
            events = as_events(self._chunks(frame))
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        answers = [Piece() for _ in self._rows]
        async for index, piece in self._pieces():
            if piece is not None:
                answers[index].add(piece)
        choices = []
        for index, finished in enumerate(answers):
            choices.append(await self.prepare(self.choice, index, finished))
        content = {**frame, "choices": choices, "usage": self.usage.as_fields()}
        return await self.prepare(JSONResponse, content)

    async def _ask(self) -> None:
        engine, adapters = self.backend.engine, self.backend.adapters
        grammar = await self.prepare(self.grammar)
        if grammar is not None:
            self._constraint = await self.backend.grammars.compile(grammar, self._tenant)
        served, adapter = await self.backend.acquire(self.body.model, self._tenant)
        release = partial(self.backend.call, adapters.release, served)
        # rows hold no exchange, which holds them
        tell = partial(_tell, self.backend, self._queue)
        try:
            with self.backend.preparations.preparing(self._tenant):
                requests = await self.requests(adapter, served.name)
            for index, request in enumerate(requests):
                self._rows.append(engine.submit(request, partial(tell, index), release))
                served.num_users += 1  # each row lets it go once
        finally:
            adapters.release(served)
        if self._gone.done():  # before there were rows that it could end
            self._cancel_rows(None)

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """Yield pieces of answers, and None after each COMMENT_S without one."""
        num_open = len(self._rows)
        while num_open:
            try:
                async with asyncio.timeout(COMMENT_S):
                    index, event = await self._queue.get()
            except TimeoutError:
                yield 0, None
                continue
            if isinstance(event, Exception):
                raise event
            num_open -= event.finish_reason is not None
            self.usage.num_new += event.num_tokens
            yield index, event

    async def _chunks(self, frame: dict[str, Any]) -> AsyncIterator[dict[str, Any] | None]:
        has_usage = (self.body.stream_options or {}).get("include_usage")
        if has_usage:
            frame["usage"] = None
        try:
            async for index, piece in self._pieces():
                if piece is None:
                    yield None
                else:
                    yield {**frame, "choices": [self.chunk(index, piece)]}
            if has_usage:
                yield {**frame, "choices": [], "usage": self.usage.as_fields()}
        finally:
            self._gone.cancel()

    def _cancel_rows(self, _: object) -> None:
        """End all that have not ended: the client has gone, or nobody listens any more."""
        for row in self._rows:
            row.is_cancelled = True
        self._queue.put_nowait((0, RequestError("the client has gone", "client_gone")))


def _tell(backend: Backend, queue: _Queue, index: int, event: Piece | Exception) -> None:
    """Pass an event of a completion on, from the engine's thread."""
    backend.call(queue.put_nowait, (index, event))


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def as_events(objects: AsyncIterator[dict[str, Any] | None]) -> AsyncIterator[str]:
    """Write objects as server-sent events, None as a comment; an error is the last one."""
    try:
        async for value in objects:
            if value is None:
                yield ": waiting\n\n"
            else:
                yield f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
    except Exception as error:
        if not isinstance(error, RequestError):
            log_failure("a stream failed", error)
        yield f"data: {bytes(answer_to(error).body).decode()}\n\n"
    yield "data: [DONE]\n\n"
