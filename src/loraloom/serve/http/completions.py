"""`/v1/completions`."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import accumulate
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from loraloom.data.tokens import encode_texts
from loraloom.errors import DataError
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.sequence import GenerationRequest, Piece, TokenLogProb
from loraloom.serve.http.asking import (
    Answers,
    Backend,
    EventStream,
    ServedModel,
    as_choices,
    ask,
    check_number,
    finite,
    new_id,
    now,
    usage,
)
from loraloom.serve.http.errors import ApiError
from loraloom.serve.http.objects import CompletionBody


async def complete_texts(backend: Backend, body: CompletionBody, http: Request) -> Response:
    """Continue texts, at once or in pieces."""
    http.state.model = body.model
    check_number(backend, body.num_requests)
    prompts = await run_in_threadpool(_encode, backend, body)
    num_prompt = http.state.num_prompt = sum(map(len, prompts))

    def make_requests(model: ServedModel) -> list[GenerationRequest]:
        return [
            request
            for prompt_ids in prompts
            for request in _requests(backend, body, model, prompt_ids)
        ]

    answers = await ask(backend, body.model, make_requests, http, in_pieces=body.stream)
    frame = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model,
    }
    if body.stream:
        return EventStream(answers, _chunks(backend, body, answers, frame, num_prompt))
    whole = await answers.collect()
    choices = await run_in_threadpool(_choices, backend, body, prompts, whole)
    num_new = sum(answer.num_tokens for answer in whole)
    return JSONResponse({**frame, "choices": choices, "usage": usage(num_prompt, num_new)})


def _encode(backend: Backend, body: CompletionBody) -> list[list[int]]:
    size = backend.engine.host.config.vocab_size
    encoded = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            try:
                prompt = encode_texts(backend.tokenizer, [prompt])[0]
            except (TypeError, ValueError) as error:
                raise DataError(f"the prompt can't be read: {error}") from None
        elif max(prompt) >= size:
            raise ApiError(
                400, f"token ids must be from 0 to {size - 1}, got {max(prompt)}", param="prompt"
            )
        encoded.append(prompt)
    return encoded


def _requests(
    backend: Backend, body: CompletionBody, model: ServedModel, prompt_ids: list[int]
) -> list[GenerationRequest]:
    """The completions of a prompt and, behind them, its own log-probabilities if wanted."""
    requests: list[GenerationRequest] = []
    if body.max_tokens != 0:
        requests += backend.requests(
            body, model, prompt_ids, body.max_tokens, body.logprobs, continues=True
        )
    if body.echo and body.logprobs is not None:
        requests.append(
            GenerationRequest(
                prompt_ids,
                model.adapter,
                model.owner,
                SamplingConfig(),
                num_logprobs=body.logprobs,
                scores_prompt=True,
            )
        )
    return requests


def _choices(
    backend: Backend, body: CompletionBody, prompts: list[list[int]], answers: list[Piece]
) -> list[dict[str, Any]]:
    """The completions of each prompt in turn."""
    rest = iter(answers)
    choices: list[dict[str, Any]] = []
    for prompt, prompt_ids in zip(body.prompts, prompts, strict=True):
        completions = [Piece("", 0, finish_reason="length") for _ in range(body.n)]
        if body.max_tokens != 0:
            completions = [next(rest) for _ in range(body.n)]
        echoed, hidden, scored = "", 0, None
        if body.echo:
            decoded = str(backend.tokenizer.decode(prompt_ids))
            echoed = prompt if isinstance(prompt, str) else decoded
            # a BOS, and SentencePiece's space behind it, are no part of a text that is echoed
            hidden = len(decoded) - len(echoed) if decoded.endswith(echoed) else 0
            scored = next(rest).log_probs if body.logprobs is not None else None
        for answer in completions:
            entries = [*(scored or []), *answer.log_probs]
            first = prompt_ids[0] if body.echo else None
            choice = _choice(backend, body, len(choices), answer, entries, -hidden, first)
            choices.append({**choice, "text": echoed + answer.text})
    return choices


async def _chunks(
    backend: Backend, body: CompletionBody, answers: Answers, frame: dict[str, Any], num_prompt: int
) -> AsyncIterator[dict[str, Any]]:
    """Chunks of all completions as they come."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        frame["usage"] = None
    num_new = 0
    offsets: Counter[int] = Counter()
    async for index, piece in answers.pieces():
        num_new += piece.num_tokens
        choice = _choice(backend, body, index, piece, piece.log_probs, offsets[index])
        offsets[index] += len(piece.text)
        yield {**frame, "choices": [choice]}
    if with_usage:
        yield {**frame, "choices": [], "usage": usage(num_prompt, num_new)}


def _choice(
    backend: Backend,
    body: CompletionBody,
    index: int,
    piece: Piece,
    entries: Sequence[TokenLogProb],
    offset: int,
    first: int | None = None,
) -> dict[str, Any]:
    """A completion, or a piece of it; other arguments as `_log_probs`."""
    choice: dict[str, Any] = {"index": index, "text": piece.text, "logprobs": None}
    if body.logprobs is not None:
        choice["logprobs"] = _log_probs(backend, entries, offset, first)
    if body.routing:
        choice["routing"] = as_choices(piece.routing)
    return {**choice, "finish_reason": piece.finish_reason}


def _log_probs(
    backend: Backend, entries: Sequence[TokenLogProb], offset: int, first: int | None = None
) -> dict[str, Any]:
    """Log-probabilities in the older form."""
    ids = [entry.token for entry in entries]
    texts = [backend.token_text(token) for token in ([] if first is None else [first]) + ids]
    unknown = [None] * (first is not None)
    places = accumulate(map(len, texts), initial=offset)
    return {
        "tokens": texts,
        "token_logprobs": [*unknown, *(finite(entry.log_prob) for entry in entries)],
        "top_logprobs": [
            *unknown,
            *(
                {backend.token_text(token): finite(value) for token, value in reversed(entry.top)}
                for entry in entries
            ),
        ],
        "text_offset": [max(0, place) for place in places][:-1],
    }
