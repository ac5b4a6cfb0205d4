"""From what HTTP asks for to what the engine does, and back to the client as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokens import text_of_token
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.sampling import end_tokens, parse_sampling
from loraloom.generation.sequence import (
    Constraint,
    Event,
    Failure,
    GenerationRequest,
    Piece,
    RequestError,
    Row,
    TokenRouting,
    log_failure,
)
from loraloom.models.layout import RowAdapter
from loraloom.routing.record import describe_router
from loraloom.serve.adapters import (
    AdapterMemoryError,
    AdapterShelf,
    ServedAdapter,
    UnknownModelError,
)
from loraloom.serve.constraints import JsonConstraints
from loraloom.serve.http.errors import ApiError, ClientGoneError, api_error
from loraloom.serve.http.guards import TENANT
from loraloom.serve.http.objects import SamplingBody

MAX_SCALE = 10.0
"""Largest factor of what an adapter adds to the base model, positive or negative."""


class ServedModel(NamedTuple):
    """A model that a request uses; the base model has no adapter to be released."""

    owner: str
    adapter: RowAdapter
    served: ServedAdapter | None


@dataclass(frozen=True)
class Backend:
    """What all routes use.

    Args:
        engine: Makes completions.
        shelf: The adapters.
        tokenizer: A copy of the base model's, for the threads of HTTP.
    """

    engine: Engine
    shelf: AdapterShelf
    tokenizer: PreTrainedTokenizerBase

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

    async def acquire(self, model: str, gone: asyncio.Task[None]) -> ServedModel:
        """Begin to use the adapter that a model's name says, as soon as it is there."""
        if model == self.shelf.base_name:
            return ServedModel(model, None, None)
        name, colon, text = model.partition(":")
        if name == self.shelf.base_name:
            raise ApiError(
                400,
                "the base model has no scale, which is of what an adapter adds; ask for its name "
                "alone",
                param="model",
            )
        scale = _scale(text) if colon else None
        try:
            adapter = self.shelf.take(name) or await self._wait_for(name, gone)
        except (UnknownModelError, AdapterMemoryError):
            raise
        except (FormatError, AdapterError) as error:
            log_failure(f"adapter {shown(name)} could not be loaded", error)
            raise ApiError(
                500,
                f"the adapter {shown(name)} can't be loaded; the server's log says why",
                code="broken_adapter",
            ) from None
        row_adapter = adapter.host_name if scale is None else (adapter.host_name, scale)
        return ServedModel(name, row_adapter, adapter)

    async def _wait_for(self, name: str, gone: asyncio.Task[None]) -> ServedAdapter:
        loading = self.shelf.request(name)
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
                self.shelf.abandon(loading)
        if gone in done:
            raise ClientGoneError
        late = f"the model {shown(name)} must be loaded in {limit_s:g} seconds"
        raise RequestError(late, "timeout")

    def release(self, model: ServedModel) -> None:
        """End using a model."""
        if model.served is not None:
            self.shelf.release(model.served)

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Most tokens that may follow a prompt."""
        room = self.engine.max_length - len(prompt_ids)
        if room < 1:
            raise ApiError(
                400,
                f"the prompt must have fewer than {self.engine.max_length} tokens, which is what "
                f"model and cache have room for, got {len(prompt_ids)}; shorten it",
                code="context_length_exceeded",
            )
        return room

    def requests(
        self,
        body: SamplingBody,
        model: ServedModel,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None,
        num_logprobs: int | None,
        make_constraint: Callable[[], Constraint] | None = None,
        *,
        continues: bool = False,
    ) -> list[GenerationRequest]:
        """Make the engine's requests for the completions of a prompt."""
        room = self.room(prompt_ids)
        sampling = parse_sampling(
            max_new_tokens=room if max_new_tokens is None else max_new_tokens,
            temperature=body.temperature,
            repetition_penalty=body.repetition_penalty,
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
            stop=body.stop_texts,
            # at temperature 0 the most likely token is among those to draw from, however few
            **({"top_k": body.top_k, "top_p": body.top_p} if body.temperature > 0 else {}),
        )
        return [
            GenerationRequest(
                prompt_ids,
                model.adapter,
                model.owner,
                sampling,
                place,
                num_logprobs=num_logprobs,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=self._logit_bias(body),
                ignore_end=body.ignore_eos,
                constraint=None if make_constraint is None else make_constraint(),
                tells_routing=body.routing,
                continues=continues,
            )
            for place in range(body.n)
        ]

    def token_text(self, token: int) -> str:
        """The text of a token alone."""
        if token not in self._token_texts:
            self._token_texts[token] = text_of_token(self.tokenizer, token)
        return self._token_texts[token]

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        return {}

    def _logit_bias(self, body: SamplingBody) -> dict[int, float]:
        largest = self.engine.host.config.vocab_size - 1
        for key in body.logit_bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) <= largest):
                raise ApiError(
                    400,
                    f"logit_bias must have token ids from 0 to {largest} as keys, got {shown(key)}",
                    param="logit_bias",
                )
        return {int(key): bias for key, bias in (body.logit_bias or {}).items()}


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


class Answers:
    """The completions of one HTTP request while they are made; they end when its client goes.

    Args:
        backend: Has the engine that makes them.
        model: Released when the engine has let all of them go.
        requests: One for each.
        gone: Ends when the client goes away.
        http: The request, in whose state tokens are counted.
        in_pieces: Tell each piece as it comes, instead of all when a completion has ended.
    """

    def __init__(
        self,
        backend: Backend,
        model: ServedModel,
        requests: Sequence[GenerationRequest],
        gone: asyncio.Task[None],
        http: Request,
        *,
        in_pieces: bool,
    ):
        self._engine, self._mailbox = backend.engine, backend.mailbox
        self._num_open = len(requests)
        self._gone = gone
        self._state = http.state
        self._state.num_new = 0
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._rows: list[Row] = []
        release = partial(backend.release, model)
        if model.served is not None:
            backend.shelf.share(model.served, len(requests))
        try:
            for index, request in enumerate(requests):
                sink = partial(self._tell, index, None if in_pieces else Piece("", 0))
                self._rows.append(self._engine.submit(request, sink, release, is_accepted=True))
        except Exception:
            self.close()
            for _ in requests[len(self._rows) :]:
                release()
            raise
        gone.add_done_callback(lambda _: self._queue.put_nowait((0, Failure(ClientGoneError()))))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Give each piece with the place of its request, until all have ended."""
        while self._num_open:
            index, event = await self._queue.get()
            if isinstance(event, Failure):
                raise event.error
            self._num_open -= event.finish_reason is not None
            self._state.num_new += event.num_tokens
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
            self._engine.cancel(row)

    def _tell(self, index: int, whole: Piece | None, event: Event) -> None:
        if whole is not None and isinstance(event, Piece):
            whole.add(event)
            if event.finish_reason is None:
                return
            event = whole
        self._mailbox.put(self._queue, (index, event))


async def ask(
    backend: Backend,
    model: str,
    make_requests: Callable[[ServedModel], Sequence[GenerationRequest]],
    http: Request,
    *,
    in_pieces: bool,
) -> Answers:
    """Hand the engine what a model is asked for."""
    tenant, arrived_s = http.scope.get(TENANT, ""), time.monotonic()
    gone = asyncio.create_task(_disconnected(http))
    try:
        with backend.engine.accepting():
            served = await backend.acquire(model, gone)
            try:
                requests = [
                    replace(request, tenant=tenant, arrived_s=arrived_s)
                    for request in await run_in_threadpool(make_requests, served)
                ]
            except BaseException:
                backend.release(served)
                raise
            return Answers(backend, served, requests, gone, http, in_pieces=in_pieces)
    except BaseException:
        gone.cancel()
        raise


async def _disconnected(http: Request) -> None:
    """Wait until the client has gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def check_number(backend: Backend, number: int) -> None:
    """Refuse for good what could be told to come back for ever, before anything is made of it."""
    most = backend.engine.limits.max_waiting
    if number > most:
        raise ApiError(
            400,
            f"a request must ask for at most {most} completions, prompts to be scored included, "
            f"got {number}; send several",
        )


class EventStream(StreamingResponse):
    """Objects as server-sent events; the answers are closed whatever becomes of the client."""

    def __init__(self, answers: Answers, objects: AsyncIterator[dict[str, Any]]):
        events = as_events(objects)
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def as_events(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Write objects as server-sent events; an error is the last one."""
    try:
        async for value in objects:
            yield f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    except ClientGoneError:
        return
    except Exception as error:
        if not isinstance(error, ApiError):
            log_failure("a stream failed", error)
        yield f"data: {json.dumps(api_error(error).body.model_dump())}\n\n"
    yield "data: [DONE]\n\n"


def usage(num_prompt: int, num_completion: int) -> dict[str, int]:
    """Count tokens."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def as_choices(routing: Sequence[TokenRouting]) -> list[dict[str, Any]]:
    """What routers did with tokens, as it is told; weights have four digits."""
    return [
        {
            "text": text,
            "routers": [
                {
                    "router": describe_router(choice.router),
                    "num_experts": choice.num_experts,
                    "experts": choice.experts,
                    "weights": [round(weight, 4) for weight in choice.weights],
                }
                for choice in choices
            ],
        }
        for text, choices in routing
    ]


def finite(log_prob: float) -> float:
    """A log-probability as JSON can write it, which has no infinity."""
    return max(log_prob, -9999.0)


def new_id(kind: str) -> str:
    """An id for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not abs(scale) <= MAX_SCALE:
        raise ApiError(
            400,
            f"model must be a name, or name:scale with a scale from -{MAX_SCALE:g} to "
            f"{MAX_SCALE:g}, got the scale {shown(text)}",
            param="model",
        )
    return scale
