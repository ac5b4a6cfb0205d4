"""`/v1/chat/completions` and `/v1/completions`: what is asked, whole answers and pieces of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import Request
from openai.types.chat.chat_completion_message_function_tool_call import Function
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from loraloom.config.data import PromptForm
from loraloom.data.tokens import encode_texts
from loraloom.errors import DataError
from loraloom.generation.prompts import EncodedPrompt, Prompt, encode_prompt, form_for
from loraloom.generation.sampling import parse_sampling
from loraloom.generation.sequence import Constraint, GenerationRequest, Piece
from loraloom.models.layout import RowAdapter
from loraloom.routing.record import describe_router
from loraloom.serve.http.bridge import Backend, Exchange
from loraloom.serve.http.schemas import ChatBody, CompletionBody, SamplingBody
from loraloom.serve.http.tools import CallStream, arguments_schema, call_schema, parse_calls


def generation_requests(
    backend: Backend,
    body: SamplingBody,
    prompt: GenerationRequest,
    max_new_tokens: int | None,
    make_constraint: Callable[[], Constraint] | None = None,
) -> list[GenerationRequest]:
    room = max(1, backend.engine.max_length - len(prompt.prompt_ids))
    sampling = parse_sampling(
        max_new_tokens=room if max_new_tokens is None else max_new_tokens,
        temperature=body.temperature,
        repetition_penalty=body.repetition_penalty,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        stop=body.stop_texts,
        # at temperature 0 the most likely token is among those to draw from, however few
        **({"top_k": body.top_k, "top_p": body.top_p} if body.temperature > 0 else {}),
    )
    request = replace(
        prompt,
        sampling=sampling,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias or {},
        ignore_end=body.ignore_eos,
        tells_routing=body.routing,
    )
    return [
        replace(request, place=place, constraint=make_constraint and make_constraint())
        for place in range(body.n)
    ]


class ChatExchange(Exchange):
    """A conversation to be continued."""

    kind = ("chatcmpl", "chat.completion", "chat.completion.chunk")
    body: ChatBody

    def __init__(self, backend: Backend, body: ChatBody, http: Request):
        super().__init__(backend, body, http, body.n)
        self._opened: set[int] = set()
        names, self._named = body.callable_names, body.named_tool
        self._streams = [CallStream(names) for _ in range(body.n)] if names else []

    @override
    def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        body, backend = self.body, self.backend
        schema, tools = body.schema_of_answer, body.tools or ()
        if body.named_tool:
            named = (tool for tool in tools if tool["function"]["name"] == body.named_tool)
            schema = arguments_schema(next(named))
        elif body.tool_choice == "required":
            try:
                schema = call_schema(tools)
            except RecursionError:
                raise DataError("a tool's schema must not be nested so deeply") from None
        # compiled once for all answers
        make = None if schema is None else backend.read_schema(schema).copy
        form = form_for(backend.engine.host, adapter)
        ids, continues = encode_chat(backend.tokenizer, body, form)
        self.num_prompt = len(ids)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        prompt = GenerationRequest(
            ids, adapter, owner, num_logprobs=num_logprobs, continues=continues
        )
        max_tokens = body.max_tokens or body.max_completion_tokens
        return generation_requests(backend, body, prompt, max_tokens, make)

    @override
    def choices(self, answers: list[Piece]) -> list[dict[str, Any]]:
        choices = []
        for index, answer in enumerate(answers):
            content, calls = answer.text, []
            if self._named:
                content, calls = "", [Function(name=self._named, arguments=answer.text)]
            elif self._streams:
                content, calls = parse_calls(answer.text, self.body.callable_names)
            message: dict[str, Any] = {"role": "assistant", "content": content}
            if calls:
                message |= {"content": content or None, "tool_calls": _called(calls)}
            reason = self._reason(answer, calls)
            choices.append(self._choice(index, "message", message, answer, reason))
        return choices

    @override
    def chunk(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        text, calls, choices = piece.text, [], []
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if index not in self._opened:
            self._opened.add(index)
            if self._named:
                call = Function(name=self._named, arguments="")
                delta |= {"content": None, "tool_calls": _called([call], in_pieces=True)}
            choices.append(self._choice(index, "delta", delta))
        if self._streams:
            text = self._streams[index].push(text)
            if piece.finish_reason is not None:
                rest, calls = self._streams[index].finish()
                text += rest
        if text or piece.log_probs or piece.routing:
            delta = {"content": text}
            if self._named:
                delta = {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
            choices.append(self._choice(index, "delta", delta, piece))
        if calls:
            delta = {"tool_calls": _called(calls, in_pieces=True)}
            choices.append(self._choice(index, "delta", delta))
        if piece.finish_reason is not None:
            reason = self._reason(piece, calls)
            choices.append(self._choice(index, "delta", {}, reason=reason))
        return choices

    def _choice(
        self,
        index: int,
        key: str,
        said: dict[str, Any],
        piece: Piece | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """An answer or a part of it, with what is told of the tokens of a piece."""
        choice = {"index": index, key: said, "logprobs": None, "finish_reason": reason}
        if piece is not None and self.body.logprobs:
            entries = [
                self._entry(token, log_prob) | {"top_logprobs": [self._entry(*one) for one in top]}
                for token, log_prob, top in piece.log_probs
            ]
            choice["logprobs"] = {"content": entries}
        if piece is not None and self.body.routing:
            choice["routing"] = _routing(piece)
        return choice

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self.backend.token_text(token)
        is_whole = "\N{REPLACEMENT CHARACTER}" not in text
        encoded = list(text.encode()) if is_whole else None
        return {"token": text, "logprob": _finite(log_prob), "bytes": encoded}

    def _reason(self, piece: Piece, calls: list[Function]) -> str | None:
        """Why an answer ended, as OpenAI says it: one that was told what to call just stops."""
        is_called = calls and not self._named and piece.finish_reason == "stop"
        return "tool_calls" if is_called else piece.finish_reason


class TextExchange(Exchange):
    """Texts to be continued, and perhaps to be scored."""

    kind = ("cmpl", "text_completion", "text_completion")
    body: CompletionBody

    def __init__(self, backend: Backend, body: CompletionBody, http: Request):
        num_completions = 0 if body.max_tokens == 0 else body.n
        num_requests = len(body.prompts) * max(1, num_completions + body.is_scored)
        super().__init__(backend, body, http, num_requests)
        self._prompts: list[list[int]] = []

    @override
    def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        """The completions of each prompt and, behind them, its own log-probabilities if wanted."""
        body, requests = self.body, []
        for prompt in body.prompts:
            if isinstance(prompt, str):
                try:
                    prompt = encode_texts(self.backend.tokenizer, [prompt])[0]
                except (TypeError, ValueError) as error:
                    raise DataError(f"the prompt can't be read: {error}") from None
            self._prompts.append(prompt)
            request = GenerationRequest(
                prompt, adapter, owner, num_logprobs=body.logprobs, continues=True
            )
            if body.max_tokens != 0:
                requests += generation_requests(self.backend, body, request, body.max_tokens)
            if body.is_scored:
                requests.append(replace(request, scores_prompt=True))
        self.num_prompt = sum(map(len, self._prompts))
        return requests

    @override
    def choices(self, answers: list[Piece]) -> list[dict[str, Any]]:
        rest, choices, body = iter(answers), [], self.body
        for prompt, prompt_ids in zip(body.prompts, self._prompts, strict=True):
            completions = [Piece("", 0, finish_reason="length") for _ in range(body.n)]
            if body.max_tokens != 0:
                completions = [next(rest) for _ in range(body.n)]
            echoed, scored, first = "", [], None
            if body.echo:
                decoded, first = str(self.backend.tokenizer.decode(prompt_ids)), prompt_ids[0]
                echoed = prompt if isinstance(prompt, str) else decoded
                scored = next(rest).log_probs if body.is_scored else []
            for answer in completions:
                whole = replace(answer, text=echoed + answer.text)
                whole.log_probs = [*scored, *answer.log_probs]
                choices.append(self._choice(len(choices), whole, first))
        return choices

    @override
    def chunk(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        return [self._choice(index, piece)]

    def _choice(self, index: int, piece: Piece, first: int | None = None) -> dict[str, Any]:
        """A completion or a piece of it; `first` is a token that has no log-probability."""
        choice: dict[str, Any] = {"index": index, "text": piece.text, "logprobs": None}
        if self.body.logprobs is not None:
            text_of, entries = self.backend.token_text, piece.log_probs
            tops = [
                {text_of(token): _finite(value) for token, value in reversed(entry.top)}
                for entry in entries
            ]
            unknown = [] if first is None else [None]
            choice["logprobs"] = {
                "tokens": [*map(text_of, () if first is None else (first,))]
                + [text_of(entry.token) for entry in entries],
                "token_logprobs": [*unknown, *(_finite(entry.log_prob) for entry in entries)],
                "top_logprobs": [*unknown, *tops],
            }
        if self.body.routing:
            choice["routing"] = _routing(piece)
        return {**choice, "finish_reason": piece.finish_reason}


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, body: ChatBody, form: PromptForm | None = None
) -> EncodedPrompt:
    if form is None and not tokenizer.chat_template:
        raise DataError(
            "the base model's tokenizer has no chat template; use /v1/completions instead"
        )
    messages: tuple[Any, ...] = tuple(message.as_turn() for message in body.messages)
    plain = Prompt(messages, origin="messages")
    if not body.tools or body.tool_choice == "none":
        return encode_prompt(tokenizer, plain, form)
    tools: list[Any] = list(body.tools)
    encoded = encode_prompt(tokenizer, replace(plain, tools=tools), form)
    if encoded == encode_prompt(tokenizer, plain, form):
        raise DataError(
            "tools: the chat template leaves tools out, so the model would never read them; start "
            "the server with a --chat-template that writes them, or leave tools out"
        )
    return encoded


def _called(calls: list[Function], *, in_pieces: bool = False) -> list[dict[str, Any]]:
    return [
        {**({"index": place} if in_pieces else {}), "id": f"call-{secrets.token_hex(12)}"}
        | {"type": "function", "function": call.model_dump()}
        for place, call in enumerate(calls)
    ]


def _routing(piece: Piece) -> list[dict[str, Any]]:
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
        for text, choices in piece.routing
    ]


def _finite(log_prob: float) -> float:
    # A log-probability as JSON can write it, which has no infinity
    return max(log_prob, -9999.0)
