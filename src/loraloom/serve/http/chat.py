"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PromptForm
from loraloom.errors import DataError
from loraloom.generation.prompts import EncodedPrompt, Prompt, encode_prompt, form_for
from loraloom.generation.sequence import Constraint, FinishReason, GenerationRequest, Piece
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
from loraloom.serve.http.objects import ChatBody, FunctionCall
from loraloom.serve.http.tool_calls import (
    CallStream,
    Said,
    arguments_schema,
    call_schema,
    parse_calls,
)


async def complete_chat(backend: Backend, body: ChatBody, http: Request) -> Response:
    """Answer a conversation, at once or in pieces."""
    http.state.model = body.model
    check_number(backend, body.n)
    make_constraint = await run_in_threadpool(_constraint, backend, body)
    num_prompt = 0

    def make_requests(model: ServedModel) -> list[GenerationRequest]:
        nonlocal num_prompt
        max_tokens = body.max_tokens or body.max_completion_tokens
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        form = form_for(backend.engine.host, model.adapter)
        ids, continues = encode_chat(backend.tokenizer, body, form)
        num_prompt = http.state.num_prompt = len(ids)
        return backend.requests(
            body, model, ids, max_tokens, num_logprobs, make_constraint, continues=continues
        )

    answers = await ask(backend, body.model, make_requests, http, in_pieces=body.stream)
    frame = {"id": new_id("chatcmpl"), "created": now(), "model": body.model}
    if body.stream:
        return EventStream(answers, _chunks(backend, body, answers, frame, num_prompt))
    whole = await answers.collect()
    return JSONResponse(
        {
            **frame,
            "object": "chat.completion",
            "choices": [_choice(backend, body, *answer) for answer in enumerate(whole)],
            "usage": usage(num_prompt, sum(answer.num_tokens for answer in whole)),
        }
    )


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, body: ChatBody, form: PromptForm | None = None
) -> EncodedPrompt:
    """Token ids of a conversation up to the answer, written as the adapter's training data was."""
    if form is None and not tokenizer.chat_template:
        raise DataError(
            "the base model's tokenizer has no chat template; use /v1/completions instead"
        )
    messages: tuple[Any, ...] = tuple(message.as_turn() for message in body.messages)
    plain = Prompt(messages, origin="messages")
    if not body.tools or body.tool_choice == "none":
        return encode_prompt(tokenizer, plain, form)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    encoded = encode_prompt(tokenizer, replace(plain, tools=tools), form)
    if encoded == encode_prompt(tokenizer, plain, form):
        raise DataError(
            "tools: the chat template leaves tools out, so the model would never read them; start "
            "the server with a --chat-template that writes them, or leave tools out"
        )
    return encoded


def _constraint(backend: Backend, body: ChatBody) -> Callable[[], Constraint] | None:
    """What the answer must keep to; the schema is checked now, once for all answers."""
    schema = _schema(body)
    if schema is None:
        return None
    return backend.constraints.of_schema(schema).copy


def _schema(body: ChatBody) -> dict[str, Any] | None:
    tools = body.tools or ()
    if body.named_tool:
        return arguments_schema(next(one for one in tools if one.function.name == body.named_tool))
    if body.tool_choice == "required":
        try:
            return call_schema(tools)
        except RecursionError:
            raise DataError("a tool's schema must not be nested so deeply") from None
    return None if body.response_format is None else body.response_format.schema_of_answer


def _choice(backend: Backend, body: ChatBody, index: int, answer: Piece) -> dict[str, Any]:
    """A whole answer."""
    content, calls = _take_apart(body, answer.text)
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message = {**message, "content": content or None, "tool_calls": _called(calls)}
    reason = _reason(body, answer.finish_reason, calls)
    return {**_details(backend, body, index, answer), "message": message, "finish_reason": reason}


async def _chunks(
    backend: Backend, body: ChatBody, answers: Answers, frame: dict[str, Any], num_prompt: int
) -> AsyncIterator[dict[str, Any]]:
    """Chunks of all answers as they come."""
    frame["object"] = "chat.completion.chunk"
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        frame["usage"] = None
    num_new = 0
    streams = [CallStream(body.callable_names) for _ in range(body.n if body.callable_names else 0)]
    first: dict[str, Any] = {"role": "assistant", "content": ""}
    if body.named_tool:
        call = FunctionCall(name=body.named_tool)
        first = {"role": "assistant", "content": None, "tool_calls": _called_in_pieces([call])}
    for index in range(body.n):
        yield {**frame, "choices": [_delta(index, first)]}
    async for index, piece in answers.pieces():
        num_new += piece.num_tokens
        text, calls = piece.text, []
        if streams:
            text = streams[index].push(text)
            if piece.finish_reason is not None:
                rest, calls = streams[index].finish()
                text += rest
        if text or piece.log_probs or piece.routing:
            said = {"content": text}
            if body.named_tool:
                said = {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
            choice = _delta(index, said) | _details(backend, body, index, piece)
            yield {**frame, "choices": [choice]}
        if calls:
            yield {**frame, "choices": [_delta(index, {"tool_calls": _called_in_pieces(calls)})]}
        if piece.finish_reason is not None:
            reason = _reason(body, piece.finish_reason, calls)
            yield {**frame, "choices": [_delta(index, {}) | {"finish_reason": reason}]}
    if with_usage:
        yield {**frame, "choices": [], "usage": usage(num_prompt, num_new)}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _details(backend: Backend, body: ChatBody, index: int, piece: Piece) -> dict[str, Any]:
    """What is told of tokens, of a whole answer and of a piece of it alike."""
    details: dict[str, Any] = {"index": index, "logprobs": None}
    if body.logprobs:
        entries = [
            {
                **_entry(backend, token, log_prob),
                "top_logprobs": [_entry(backend, *pair) for pair in top],
            }
            for token, log_prob, top in piece.log_probs
        ]
        details["logprobs"] = {"content": entries}
    if body.routing:
        details["routing"] = as_choices(piece.routing)
    return details


def _take_apart(body: ChatBody, text: str) -> Said:
    """Tell a whole answer's text from its calls."""
    if body.named_tool:
        return Said("", [FunctionCall(name=body.named_tool, arguments=text)])
    return parse_calls(text, body.callable_names) if body.callable_names else Said(text, [])


def _reason(body: ChatBody, reason: FinishReason | None, calls: list[FunctionCall]) -> str | None:
    """Why an answer ended, as OpenAI says it: one that was told what to call just stops."""
    return "tool_calls" if calls and not body.named_tool and reason == "stop" else reason


def _called(calls: list[FunctionCall]) -> list[dict[str, Any]]:
    return [
        {"id": new_id("call"), "type": "function", "function": call.model_dump()} for call in calls
    ]


def _called_in_pieces(calls: list[FunctionCall]) -> list[dict[str, Any]]:
    return [{"index": place, **call} for place, call in enumerate(_called(calls))]


def _entry(backend: Backend, token: int, log_prob: float) -> dict[str, Any]:
    text = backend.token_text(token)
    is_whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {
        "token": text,
        "logprob": finite(log_prob),
        "bytes": list(text.encode()) if is_whole else None,
    }
