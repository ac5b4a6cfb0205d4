"""From what HTTP asks for to what the engine does, and back to the client as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokens import text_of_token
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.sampling import end_tokens
from loraloom.generation.sequence import (
    Event,
    Failure,
    GenerationRequest,
    Piece,
    RequestError,
    Row,
    log_failure,
)
from loraloom.models.layout import RowAdapter
from loraloom.serve.adapters import ServedAdapter, ServedAdapters
from loraloom.serve.http.guards import TENANT, answer_to
from loraloom.serve.http.schemas import SamplingBody
from loraloom.serve.http.tools import JsonConstraint, schema_reader

# Largest factor of what an adapter adds to the base model, positive or negative.
MAX_SCALE = 10.0


@dataclass
class Backend:
    """The engine, the adapters, and a copy of the base model's tokenizer for HTTP's threads."""

    engine: Engine
    adapters: ServedAdapters
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def token_text(self) -> Callable[[int], str]:
        return cache(partial(text_of_token, self.tokenizer))

    @cached_property
    def mailbox(self) -> Mailbox:
        return Mailbox(asyncio.get_running_loop())

    @cached_property
    def read_schema(self) -> Callable[[dict[str, Any]], JsonConstraint]:  # takes a second
        host = self.engine.host
        ends = end_tokens(host, self.tokenizer)
        return schema_reader(self.tokenizer, host.config.vocab_size, ends)

    async def acquire(
        self, model: str, gone: asyncio.Task[None]
    ) -> tuple[ServedAdapter, RowAdapter]:
        """Begin to use the adapter that a model's name says, as soon as it is there."""
        base, (name, colon, text) = self.adapters.base_name, model.partition(":")
        if model == base:
            name, colon = model, ""
        elif name == base:
            raise RequestError(
                "the base model has no scale, which is of what an adapter adds; ask for its name "
                "alone",
                param="model",
            )
        scale = _scale(text) if colon else None
        try:
            adapter = self.adapters.take(name) or await self._wait_for(name, gone)
        except (FormatError, AdapterError) as error:
            log_failure(f"adapter {shown(name)} could not be loaded", error)
            raise RequestError(
                f"the adapter {shown(name)} can't be loaded; the server's log says why",
                "broken_adapter",
            ) from None
        if scale is None or adapter.host_name is None:
            return adapter, adapter.host_name
        return adapter, (adapter.host_name, scale)

    async def _wait_for(self, name: str, gone: asyncio.Task[None]) -> ServedAdapter:
        adapter = asyncio.create_task(self.adapters.acquire(name))
        limit_s = self.engine.limits.max_request_s
        try:
            done, _ = await asyncio.wait(
                {adapter, gone}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if adapter in done:
                return adapter.result()
        finally:
            adapter.cancel()  # as nobody waits for it now
        if gone in done:
            raise _client_gone()
        late = f"the model {shown(name)} must be loaded in {limit_s:g} seconds"
        raise RequestError(late, "timeout")


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= MAX_SCALE:
        raise RequestError(
            f"model must be a name, or name:scale with a scale from -{MAX_SCALE:g} to "
            f"{MAX_SCALE:g}, got the scale {shown(text)}",
            param="model",
        )
    return scale


def _client_gone() -> RequestError:
    return RequestError("the client has gone", "client_gone")


class Mailbox:
    """Calls functions in an event loop for the engine's thread, those of a step together.

    Each call into the loop takes some 20 µs of a core from those that compute.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._sent: deque[tuple[Callable[[Any], object], Any]] = deque()
        self._is_called = False

    def call(self, function: Callable[[Any], object], argument: object) -> None:
        self._sent.append((function, argument))
        if not self._is_called:
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # first, so that what comes meanwhile is not lost
        while self._sent:
            function, argument = self._sent.popleft()
            function(argument)


class Exchange(ABC):
    """A request for completions, and its answers while they are made; they end with its client."""

    kind: tuple[str, str, str]
    """The beginning of ids, the object of a whole answer and that of a chunk."""

    def __init__(self, backend: Backend, body: SamplingBody, http: Request, num_requests: int):
        self.backend = backend
        self.body = body
        self._num_requests = num_requests
        self.num_prompt = 0
        self._num_new = 0
        self._http = http
        self._mailbox = backend.mailbox  # made here, in the event loop's thread
        self._arrived_s = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._rows: list[Row] = []
        self._num_open = 0
        # nothing else reads from the connection while the engine works
        self._gone = asyncio.create_task(self._until_disconnected())
        self._gone.add_done_callback(self._end)

    @abstractmethod
    def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        """What the engine is asked for; made in a thread."""

    @abstractmethod
    def choices(self, answers: list[Piece]) -> list[dict[str, Any]]:
        """Whole answers; made in a thread."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the chunks in which a piece of an answer is told."""

    async def respond(self) -> Response:
        body = self.body
        try:
            await self._ask()
            prefix, whole, chunk = self.kind
            frame = {
                "id": f"{prefix}-{secrets.token_hex(12)}",
                "object": chunk if body.stream else whole,
                "created": int(time.time()),
                "model": body.model,
            }
            if body.stream:
                events, headers = as_events(self._chunks(frame)), {"Cache-Control": "no-cache"}
                return StreamingResponse(events, media_type="text/event-stream", headers=headers)
            answers = {index: piece async for index, piece in self._pieces()}
            in_order = [answers[index] for index in sorted(answers)]
            choices = await run_in_threadpool(self.choices, in_order)
            return JSONResponse({**frame, "choices": choices, "usage": self._usage()})
        finally:
            if not body.stream or not self._num_open:
                self._end()

    async def _ask(self) -> None:
        """Hand the engine what a model is asked for."""
        engine, adapters, state = self.backend.engine, self.backend.adapters, self._http.state
        state.model, most = self.body.model, engine.limits.max_waiting
        if self._num_requests > most:  # it could be told to come back for ever
            raise RequestError(
                f"a request must ask for at most {most} completions, prompts to be scored "
                f"included, got {self._num_requests}; send several"
            )
        tenant = self._http.scope.get(TENANT, "")
        with engine.accepting():
            served, adapter = await self.backend.acquire(self.body.model, self._gone)
            num_uses, release = 1, partial(self._mailbox.call, adapters.release, served)
            try:
                requests = await run_in_threadpool(self.requests, adapter, served.name)
                state.num_prompt, num_uses = self.num_prompt, len(requests)
                served.num_users += num_uses - 1  # each lets it go once
                for index, request in enumerate(requests):
                    request = replace(request, tenant=tenant, arrived_s=self._arrived_s)
                    whole = None if self.body.stream else Piece("", 0)
                    sink = partial(self._tell, index, whole)
                    self._rows.append(engine.submit(request, sink, release, is_accepted=True))
            except BaseException:
                for _ in range(num_uses - len(self._rows)):
                    release()
                raise
            if self._gone.done():  # before there were rows that it could end
                raise _client_gone()
            self._num_open = len(requests)

    def _tell(self, index: int, whole: Piece | None, event: Event) -> None:
        """Take an event in the engine's thread; an answer that is not streamed, when it ended."""
        if whole is not None and isinstance(event, Piece):
            whole.add(event)
            if event.finish_reason is None:
                return
            event = whole
        self._mailbox.call(self._queue.put_nowait, (index, event))

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._num_open:
            index, event = await self._queue.get()
            if isinstance(event, Failure):
                raise event.error
            self._num_open -= event.finish_reason is not None
            self._num_new += event.num_tokens
            self._http.state.num_new = self._num_new
            yield index, event

    async def _chunks(self, frame: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            if self.body.includes_usage:
                frame["usage"] = None
            async for index, piece in self._pieces():
                for choice in self.chunk(index, piece):
                    yield {**frame, "choices": [choice]}
            if self.body.includes_usage:
                yield {**frame, "choices": [], "usage": self._usage()}
        finally:
            self._end()

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": self._num_new,
            "total_tokens": self.num_prompt + self._num_new,
        }

    async def _until_disconnected(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass

    def _end(self, *_: object) -> None:
        """End all that have not ended: the client has gone, or wants no more."""
        self._gone.cancel()
        for row in self._rows:
            row.is_cancelled = True
        self._queue.put_nowait((0, Failure(_client_gone())))


async def as_events(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Write objects as server-sent events; an error is the last one."""
    try:
        async for value in objects:
            yield f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    except Exception as error:
        if not isinstance(error, RequestError):
            log_failure("a stream failed", error)
        yield f"data: {bytes(answer_to(error).body).decode()}\n\n"
    yield "data: [DONE]\n\n"
