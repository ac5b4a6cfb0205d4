"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from loraloom.data.tokenising import encode_texts
from loraloom.errors import DataError
from loraloom.serve.http.asking import (
    Answer,
    Answers,
    Backend,
    EventStream,
    as_events,
    collect,
    new_id,
    now,
    usage,
)
from loraloom.serve.http.errors import ApiError
from loraloom.serve.http.objects import (
    Completion,
    CompletionBody,
    CompletionChoice,
    CompletionLogProbs,
)
from loraloom.serve.sequence import TokenLogProb


async def complete_texts(backend: Backend, body: CompletionBody, http: Request) -> Response:
    """Continue texts, at once or in pieces."""
    prompts = await run_in_threadpool(_encode, backend, body)
    adapter = await backend.acquire(body.model)
    try:
        requests = [
            request
            for prompt_ids in prompts
            for request in backend.requests(
                body, adapter, prompt_ids, body.max_tokens or 16, body.logprobs
            )
        ]
        answers = Answers(backend.engine, requests, http)
    except BaseException:
        backend.release(adapter)
        raise

    def end() -> None:
        answers.close()
        backend.release(adapter)

    num_prompt = sum(map(len, prompts))
    if body.stream:
        return EventStream(as_events(_chunks(backend, body, answers, num_prompt)), end)
    try:
        whole = await collect(answers, len(requests))
    finally:
        end()
    completion = Completion(
        id=new_id("cmpl"),
        created=now(),
        model=body.model,
        choices=[_choice(backend, body, index, answer) for index, answer in enumerate(whole)],
        usage=usage(num_prompt, sum(answer.num_tokens for answer in whole)),
    )
    return Response(completion.model_dump_json(), media_type="application/json")


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


def _choice(backend: Backend, body: CompletionBody, index: int, answer: Answer) -> CompletionChoice:
    log_probs = None
    if body.logprobs is not None:
        log_probs = _log_probs(backend, answer.log_probs or [], 0)
    return CompletionChoice(
        index=index, text=answer.text, logprobs=log_probs, finish_reason=answer.finish_reason
    )


async def _chunks(
    backend: Backend, body: CompletionBody, answers: Answers, num_prompt: int
) -> AsyncIterator[dict[str, Any]]:
    """Chunks of all completions as they come."""
    frame = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": now(),
        "model": body.model,
    }
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    num_new = 0
    offsets: dict[int, int] = {}
    async for index, piece in answers.pieces():
        num_new += piece.num_tokens
        log_probs = None
        if body.logprobs is not None:
            offset = offsets.get(index, 0)
            log_probs = _log_probs(backend, piece.log_probs, offset).model_dump()
            offsets[index] = offset + len(piece.text)
        choice = {
            "index": index,
            "text": piece.text,
            "logprobs": log_probs,
            "finish_reason": piece.finish_reason,
        }
        yield {**frame, "choices": [choice], **({"usage": None} if with_usage else {})}
    if with_usage:
        yield {**frame, "choices": [], "usage": usage(num_prompt, num_new).model_dump()}


def _log_probs(backend: Backend, log_probs: list[TokenLogProb], offset: int) -> CompletionLogProbs:
    """Log-probabilities in the older form; a token's offset is where its text begins."""
    texts = [backend.token_text(token) for token, _, _ in log_probs]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogProbs(
        tokens=texts,
        token_logprobs=[max(log_prob, -9999.0) for _, log_prob, _ in log_probs],
        top_logprobs=[
            {backend.token_text(token): max(value, -9999.0) for token, value in top}
            for _, _, top in log_probs
        ],
        text_offset=offsets,
    )
