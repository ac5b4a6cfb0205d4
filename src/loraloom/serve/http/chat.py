"""`/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Literal

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PromptForm
from loraloom.errors import DataError
from loraloom.infer.prompts import EncodedPrompt, Prompt, encode_prompt, form_for
from loraloom.serve.http.asking import (
    Answers,
    Backend,
    EventStream,
    ServedModel,
    as_choices,
    ask,
    check_number,
    collect,
    finite,
    new_id,
    now,
    usage,
)
from loraloom.serve.http.objects import (
    AssistantMessage,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatLogProbs,
    FunctionCall,
    JsonObjectFormat,
    JsonSchemaFormat,
    NamedTool,
    TokenLogProbs,
    ToolCall,
    TopLogProb,
)
from loraloom.serve.http.tool_calls import (
    CallStream,
    Said,
    arguments_schema,
    call_schema,
    parse_calls,
)
from loraloom.serve.sequence import (
    Constraint,
    FinishReason,
    GenerationRequest,
    Piece,
    TokenLogProb,
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
    if body.stream:
        return EventStream(answers, _chunks(backend, body, answers, num_prompt))
    whole = await collect(answers)
    completion = ChatCompletion(
        id=new_id("chatcmpl"),
        created=now(),
        model=body.model,
        choices=[_choice(backend, body, index, answer) for index, answer in enumerate(whole)],
        usage=usage(num_prompt, sum(answer.num_tokens for answer in whole)),
    )
    return Response(completion.model_dump_json(), media_type="application/json")


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
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        tools = body.tools or ()
        return arguments_schema(next(tool for tool in tools if tool.function.name == name))
    if body.tool_choice == "required":
        try:
            return call_schema(body.tools or ())
        except RecursionError:
            raise DataError("a tool's schema must not be nested so deeply") from None
    match body.response_format:
        case JsonSchemaFormat(json_schema=described):
            return described.schema_
        case JsonObjectFormat():
            return {"type": "object"}
    return None


def _choice(backend: Backend, body: ChatBody, index: int, answer: Piece) -> ChatChoice:
    content, calls = _said_by(body, answer.text)
    return ChatChoice(
        index=index,
        message=AssistantMessage(
            content=None if calls and not content else content,
            tool_calls=[ToolCall(id=new_id("call"), function=call) for call in calls] or None,
        ),
        logprobs=_log_probs(backend, answer.log_probs) if body.logprobs else None,
        finish_reason=_reason(body, answer.finish_reason, calls),
        routing=as_choices(answer.routing) if body.routing else None,
    )


def _said_by(body: ChatBody, text: str) -> Said:
    """Take a whole answer apart."""
    if isinstance(body.tool_choice, NamedTool):
        return Said("", [FunctionCall(name=body.tool_choice.function.name, arguments=text)])
    return parse_calls(text, body.callable_names) if body.callable_names else Said(text, [])


def _reason(
    body: ChatBody, reason: FinishReason | None, calls: list[FunctionCall]
) -> Literal["stop", "length", "tool_calls"] | None:
    """Why an answer ended, as OpenAI says it: one that was told what to call just stops."""
    is_free = calls and not isinstance(body.tool_choice, NamedTool)
    return "tool_calls" if is_free and reason == "stop" else reason


async def _chunks(
    backend: Backend, body: ChatBody, answers: Answers, num_prompt: int
) -> AsyncIterator[dict[str, Any]]:
    """Chunks of all answers as they come."""
    frame: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": now(),
        "model": body.model,
    }
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        frame["usage"] = None
    num_new = 0
    streams = [CallStream(body.callable_names) for _ in range(body.n if body.callable_names else 0)]
    for index in range(body.n):
        delta = {"role": "assistant", "content": "", **_first_call(body)}
        yield {**frame, "choices": [_delta(index, delta)]}
    async for index, piece in answers.pieces():
        num_new += piece.num_tokens
        text, calls = piece.text, []
        if streams:
            text = streams[index].push(text)
            if piece.finish_reason is not None:
                rest, calls = streams[index].finish()
                text += rest
        if text or piece.log_probs or piece.routing:
            choice = _delta(index, _said(body, text))
            if body.routing:
                choice["routing"] = [one.model_dump() for one in as_choices(piece.routing)]
            if body.logprobs:
                choice["logprobs"] = _log_probs(backend, piece.log_probs).model_dump()
            yield {**frame, "choices": [choice]}
        if calls:
            yield {**frame, "choices": [_delta(index, {"tool_calls": _called(calls)})]}
        if piece.finish_reason is not None:
            reason = _reason(body, piece.finish_reason, calls)
            yield {**frame, "choices": [_delta(index, {}, reason)]}
    if with_usage:
        yield {**frame, "choices": [], "usage": usage(num_prompt, num_new).model_dump()}


def _delta(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _first_call(body: ChatBody) -> dict[str, Any]:
    if not isinstance(body.tool_choice, NamedTool):
        return {}
    function = {"name": body.tool_choice.function.name, "arguments": ""}
    call = {"index": 0, "id": new_id("call"), "type": "function", "function": function}
    return {"content": None, "tool_calls": [call]}


def _called(calls: list[FunctionCall]) -> list[dict[str, Any]]:
    return [
        {"index": place, "id": new_id("call"), "type": "function", "function": call.model_dump()}
        for place, call in enumerate(calls)
    ]


def _said(body: ChatBody, text: str) -> dict[str, Any]:
    if isinstance(body.tool_choice, NamedTool):
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
    return {"content": text}


def _log_probs(backend: Backend, log_probs: list[TokenLogProb]) -> ChatLogProbs:
    return ChatLogProbs(
        content=[
            TokenLogProbs(
                **_entry(backend, token, log_prob),
                top_logprobs=[TopLogProb(**_entry(backend, *pair)) for pair in top],
            )
            for token, log_prob, top in log_probs
        ]
    )


def _entry(backend: Backend, token: int, log_prob: float) -> dict[str, Any]:
    text = backend.token_text(token)
    is_whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {
        "token": text,
        "logprob": finite(log_prob),
        "bytes": list(text.encode()) if is_whole else None,
    }
