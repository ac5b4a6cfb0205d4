"""From what HTTP asks for to what the engine does, and back to the client as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from loraloom.errors import DataError, LoraloomError
from loraloom.infer.generate import end_tokens
from loraloom.infer.sampling import parse_sampling
from loraloom.serve.adapters import AdapterShelf, ServedAdapter
from loraloom.serve.constraints import JsonConstraints
from loraloom.serve.engine import Engine
from loraloom.serve.http.errors import ApiError, api_error
from loraloom.serve.http.objects import SamplingBody, Usage
from loraloom.serve.sequence import (
    Constraint,
    Event,
    Failure,
    GenerationRequest,
    Piece,
    TokenLogProb,
)


class ClientGoneError(LoraloomError):
    """The client does not wait any more."""


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
    def constraints(self) -> JsonConstraints:
        """Made when a schema is first asked for, which takes a second."""
        host = self.engine.host
        ends = end_tokens(host, self.tokenizer)
        return JsonConstraints(self.tokenizer, host.config.vocab_size, ends)

    async def acquire(self, model: str) -> ServedAdapter | None:
        """Begin to use the adapter of a model's name; None is the base model."""
        if model == self.shelf.base_name:
            return None
        name, colon, scale = model.rpartition(":")
        if colon and _is_number(scale):
            raise ApiError(
                400,
                f"model must be a name without a scale, got {model!r}; ask for {name!r}",
                param="model",
            )
        return await run_in_threadpool(self.shelf.acquire, model)

    def release(self, adapter: ServedAdapter | None) -> None:
        """End using an adapter."""
        if adapter is not None:
            self.shelf.release(adapter)

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
        adapter: ServedAdapter | None,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None,
        num_logprobs: int | None,
        make_constraint: Callable[[], Constraint] | None = None,
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
                None if adapter is None else adapter.host_name,
                self.shelf.base_name if adapter is None else adapter.name,
                sampling,
                place,
                num_logprobs,
                body.presence_penalty,
                body.frequency_penalty,
                self._logit_bias(body),
                body.ignore_eos,
                None if make_constraint is None else make_constraint(),
            )
            for place in range(body.n)
        ]

    def token_text(self, token: int) -> str:
        """The text of a token alone."""
        return str(self.tokenizer.decode([token]))

    def _logit_bias(self, body: SamplingBody) -> dict[int, float]:
        size = self.engine.host.config.vocab_size
        for key in body.logit_bias or {}:
            if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < size):
                raise ApiError(
                    400,
                    f"logit_bias must have token ids from 0 to {size - 1} as keys, got {key!r}",
                    param="logit_bias",
                )
        return {int(key): bias for key, bias in (body.logit_bias or {}).items()}


class Answers:
    """The completions of one HTTP request while they are made.

    They end when the client goes away.

    Args:
        engine: Makes them.
        requests: One for each.
        http_request: Whose client waits.

    Raises:
        LoraloomError: If the engine takes one of them not.
    """

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest], http: Request):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._num_open = len(requests)
        self._rows = []
        try:
            for index, request in enumerate(requests):
                self._rows.append(engine.submit(request, partial(self._tell, index)))
        except Exception:
            self.cancel()
            raise
        self._watcher = self._loop.create_task(self._watch(http))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Give each piece with the place of its completion, until all have ended.

        Raises:
            ClientGoneError: If the client does not wait any more.
            Exception: Whatever made a completion fail.
        """
        while self._num_open:
            index, event = await self._events.get()
            if isinstance(event, Failure):
                raise event.error
            self._num_open -= event.finish_reason is not None
            yield index, event

    def cancel(self) -> None:
        """End all that have not ended."""
        for row in self._rows:
            self._engine.cancel(row)

    def close(self) -> None:
        """Cancel, and wait for the client's leaving no more."""
        self.cancel()
        self._watcher.cancel()

    def _tell(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the client
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def _watch(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self.cancel()
        self._events.put_nowait((0, Failure(ClientGoneError("the client has gone"))))


@dataclass
class Answer:
    """A completion that has ended."""

    text: str = ""
    num_tokens: int = 0
    log_probs: list[TokenLogProb] | None = None
    finish_reason: Any = None

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        self.text += piece.text
        self.num_tokens += piece.num_tokens
        self.log_probs = [*(self.log_probs or []), *piece.log_probs]
        self.finish_reason = piece.finish_reason


async def collect(answers: Answers, count: int) -> list[Answer]:
    """Wait for all completions."""
    whole = [Answer() for _ in range(count)]
    async for index, piece in answers.pieces():
        whole[index].add(piece)
    return whole


class EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called whatever becomes of the client."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], object]):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def as_events(objects: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Write objects as server-sent events; an error is the last one."""
    try:
        async for value in objects:
            yield f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
    except ClientGoneError:
        return
    except Exception as error:
        yield f"data: {json.dumps(api_error(error).body.model_dump())}\n\n"
    yield "data: [DONE]\n\n"


def usage(num_prompt: int, num_completion: int) -> Usage:
    """Count tokens."""
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_completion,
        total_tokens=num_prompt + num_completion,
    )


def new_id(kind: str) -> str:
    """An id for an answer."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that has all its special tokens.

    Raises:
        DataError: If it is no text that can be written as UTF-8.
    """
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except (TypeError, ValueError) as error:
        raise DataError(f"the text can't be read: {error}") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
