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
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
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
from loraloom.serve.http.tools import JsonConstraints

MAX_SCALE = 10.0
"""Largest factor of what an adapter adds to the base model, positive or negative."""


class Backend:
    """The engine, the adapters, and a copy of the base model's tokenizer for HTTP's threads."""

    def __init__(
        self, engine: Engine, adapters: ServedAdapters, tokenizer: PreTrainedTokenizerBase
    ):
        self.engine = engine
        self.adapters = adapters
        self.tokenizer = tokenizer
        self._token_texts: dict[int, str] = {}

    @cached_property
    def mailbox(self) -> Mailbox:
        """Of the event loop that the routes run on."""
        return Mailbox(asyncio.get_running_loop())

    @cached_property
    def constraints(self) -> JsonConstraints:
        """Made when a schema is first asked for, which takes a second."""
        host = self.engine.host
        ends = end_tokens(host, self.tokenizer)
        return JsonConstraints(self.tokenizer, host.config.vocab_size, ends)

    def token_text(self, token: int) -> str:
        """The text of a token alone."""
        if token not in self._token_texts:
            self._token_texts[token] = text_of_token(self.tokenizer, token)
        return self._token_texts[token]

    async def acquire(
        self, model: str, gone: asyncio.Task[None]
    ) -> tuple[ServedAdapter, RowAdapter]:
        """Begin to use the adapter that a model's name says, as soon as it is there."""
        name, colon, text = model.partition(":")
        if model == self.adapters.base_name:
            name, colon = model, ""
        elif name == self.adapters.base_name:
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
        loading = self.adapters.request(name)
        adapter = asyncio.wrap_future(loading)
        limit_s = self.engine.limits.max_request_s
        try:
            done, _ = await asyncio.wait(
                {adapter, gone}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED
            )
            if adapter in done:
                return adapter.result()
        finally:
            if not adapter.done():
                self.adapters.abandon(loading)
        if gone in done:
            raise _gone_error()
        late = f"the model {shown(name)} must be loaded in {limit_s:g} seconds"
        raise RequestError(late, "timeout")


class Mailbox:
    """Hands things from the engine's thread to tasks of an event loop, those of a step together.

    Each call into the loop takes some 20 µs of a core from those that compute.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._sent: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._is_called = False

    def put(self, queue: asyncio.Queue[Any], item: object) -> None:
        """Put something into a queue of the loop."""
        self._sent.append((queue, item))
        if self._is_called:
            return
        self._is_called = True
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # first, so that what comes meanwhile is not lost
        while self._sent:
            queue, item = self._sent.popleft()
            queue.put_nowait(item)


class Exchange(ABC):
    """A request for completions: what the engine is asked for, and how its answers are written."""

    kind: tuple[str, str, str]
    """The beginning of ids, the object of a whole answer and that of a chunk."""
    num_prompt = 0

    def __init__(self, backend: Backend, body: SamplingBody):
        self.backend = backend
        self.body = body

    @property
    @abstractmethod
    def num_requests(self) -> int:
        """Of the engine's, that come of it."""

    @abstractmethod
    def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        """What the engine is asked for; done in a thread."""

    @abstractmethod
    def choices(self, answers: list[Piece]) -> list[dict[str, Any]]:
        """Whole answers; done in a thread."""

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """Choices of chunks that come before all answers."""

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """Choices of the chunks in which a piece of an answer is told."""

    async def respond(self, http: Request) -> Response:
        """Answer at once or in pieces."""
        body, state, most = self.body, http.state, self.backend.engine.limits.max_waiting
        state.model = body.model
        if self.num_requests > most:  # it could be told to come back for ever
            raise RequestError(
                f"a request must ask for at most {most} completions, prompts to be scored "
                f"included, got {self.num_requests}; send several"
            )
        answers = Answers(self.backend, http, in_pieces=body.stream)
        await answers.ask(self)
        prefix, whole, chunk = self.kind
        frame = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": chunk if body.stream else whole,
            "created": int(time.time()),
            "model": body.model,
        }
        if body.stream:
            return EventStream(answers, self._chunks(answers, frame))
        collected = await answers.collect()
        choices = await run_in_threadpool(self.choices, collected)
        return JSONResponse({**frame, "choices": choices, "usage": self._usage(answers)})

    async def _chunks(
        self, answers: Answers, frame: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        if self.body.includes_usage:
            frame["usage"] = None
        for choice in self.opening():
            yield {**frame, "choices": [choice]}
        async for index, piece in answers.pieces():
            for choice in self.chunk(index, piece):
                yield {**frame, "choices": [choice]}
        if self.body.includes_usage:
            yield {**frame, "choices": [], "usage": self._usage(answers)}

    def _usage(self, answers: Answers) -> dict[str, int]:
        num_new = answers.num_new
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": num_new,
            "total_tokens": self.num_prompt + num_new,
        }


class Answers:
    """The completions of one HTTP request while they are made; they end when its client goes.

    Each piece is told as it comes, or `in_pieces=False` all when a completion has ended.
    """

    def __init__(self, backend: Backend, http: Request, *, in_pieces: bool):
        self.num_new = 0
        self._backend = backend
        self._mailbox = backend.mailbox  # made here, in the event loop's thread
        self._http = http
        self._in_pieces = in_pieces
        self._arrived_s = time.monotonic()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._rows: list[Row] = []
        self._num_open = 0
        self._gone = asyncio.create_task(self._until_disconnected())
        failure = (0, Failure(_gone_error()))
        self._gone.add_done_callback(lambda _: self._queue.put_nowait(failure))

    async def ask(self, exchange: Exchange) -> None:
        """Hand the engine what a model is asked for."""
        engine, adapters = self._backend.engine, self._backend.adapters
        tenant = self._http.scope.get(TENANT, "")
        try:
            with engine.accepting():
                served, adapter = await self._backend.acquire(exchange.body.model, self._gone)
                release, num_uses = partial(adapters.release, served), 1
                try:
                    requests = await run_in_threadpool(exchange.requests, adapter, served.name)
                    self._http.state.num_prompt = exchange.num_prompt
                    num_uses = self._num_open = len(requests)
                    adapters.share(served, num_uses)
                    for index, request in enumerate(requests):
                        request = replace(request, tenant=tenant, arrived_s=self._arrived_s)
                        sink = partial(self._tell, index, None if self._in_pieces else Piece("", 0))
                        self._rows.append(engine.submit(request, sink, release, is_accepted=True))
                except BaseException:
                    for _ in range(num_uses - len(self._rows)):
                        release()
                    raise
        except BaseException:
            self.close()
            raise

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Give each piece with the place of its request, until all have ended."""
        while self._num_open:
            index, event = await self._queue.get()
            if isinstance(event, Failure):
                raise event.error
            self._num_open -= event.finish_reason is not None
            self.num_new += event.num_tokens
            self._http.state.num_new = self.num_new
            yield index, event

    async def collect(self) -> list[Piece]:
        """Wait for all completions, and prompts that are scored."""
        try:
            whole = {index: piece async for index, piece in self.pieces()}
        finally:
            self.close()
        return [whole[index] for index in sorted(whole)]

    def close(self) -> None:
        """End all that have not ended."""
        self._gone.cancel()
        for row in self._rows:
            self._backend.engine.cancel(row)

    async def _until_disconnected(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass

    def _tell(self, index: int, whole: Piece | None, event: Event) -> None:
        """Take an event in the engine's thread."""
        if whole is not None and isinstance(event, Piece):
            whole.add(event)
            if event.finish_reason is None:
                return
            event = whole
        self._mailbox.put(self._queue, (index, event))


class EventStream(StreamingResponse):
    """Objects as server-sent events; the answers are closed whatever becomes of the client."""

    def __init__(self, answers: Answers, objects: AsyncIterator[dict[str, Any]]):
        headers = {"Cache-Control": "no-cache"}
        super().__init__(as_events(objects), media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


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


def _gone_error() -> RequestError:
    return RequestError("the client has gone", "client_gone")


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
