"""`/v1/chat/completions` and `/v1/completions`: what is asked, whole answers and pieces of them."""

import asyncio
import secrets
from functools import partial
from typing import Any

from fastapi import Request
from openai.types.chat.chat_completion_message_function_tool_call import Function
from typing_extensions import override

from loraloom.generation.prompts import Prompt, encode_for_choice, encode_prompt, form_for
from loraloom.generation.request import GenerationRequest, Piece, RequestError
from loraloom.host.layout import RowAdapter
from loraloom.serve.http.exchange import Backend, Exchange
from loraloom.serve.http.grammars import json_grammar
from loraloom.serve.http.schemas import ChatBody, CompletionBody
from loraloom.serve.http.tools import find_settled, parse_calls


class ChatExchange(Exchange):
    """A conversation to be continued."""

    kind = ("chatcmpl", "chat.completion", "chat.completion.chunk")
    body: ChatBody

    def __init__(self, backend: Backend, body: ChatBody, http: Request):
        super().__init__(backend, body, http)
        functions = [tool["function"] for tool in body.callable_tools]
        self._tools = {function["name"]: function.get("parameters") for function in functions}
        self._texts = [""] * body.n  # where calls are looked for
        self._num_sent = [0] * body.n  # characters of them

    @override
    def grammar(self) -> str | None:
        return json_grammar(self.body)

    @override
    async def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        body, backend = self.body, self.backend
        host, tokenizer = backend.engine.host, backend.tokenizer
        is_foreign = not backend.options.allow_control_tokens
        prompt = await self.prepare(partial(chat_prompt, body, adapter, is_foreign=is_foreign))
        tool_form = backend.options.tool_form if prompt.uses_tools else None
        encode = partial(encode_for_choice, host, tokenizer, prompt, tool_form=tool_form)
        choice = await self.choose(encode, adapter, owner)
        form = form_for(host, choice.adapter, tool_form)
        ids, turn_end = await self.prepare(encode_prompt, tokenizer, prompt, form)
        self.usage.num_prompt = len(ids)
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        request = GenerationRequest(
            ids, choice, owner, num_logprobs=num_logprobs, turn_end=turn_end
        )
        return self.several(request, body.max_completion_tokens or body.max_tokens)

    @override
    def choice(self, index: int, answer: Piece) -> dict[str, Any]:
        choice = self.chunk(index, answer)
        return {"message": {"content": None, **choice.pop("delta")}, **choice}

    @override
    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        text = piece.text
        reason = piece.finish_reason
        calls: list[Function] = []
        if self._tools:
            text, calls = self._take_text(index, piece)
        delta: dict[str, Any] = {} if index in self._told else {"role": "assistant"}
        if text or not calls:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = _called(calls)
            reason = "tool_calls" if reason == "stop" else reason
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self.body.logprobs:
            entries = []
            for token, log_prob, top in piece.log_probs:
                likeliest = [self._entry(*entry) for entry in top]
                entries.append({**self._entry(token, log_prob), "top_logprobs": likeliest})
            choice["logprobs"] = {"content": entries}
        return choice | self.told(index, piece)

    def _take_text(self, index: int, piece: Piece) -> tuple[str, list[Function]]:
        """Take the text that begins no call, and at the end all that is left, and the calls."""
        self._texts[index] += piece.text
        text = self._texts[index]
        start = self._num_sent[index]
        if piece.finish_reason is None:
            end = find_settled(text, start, self._tools)
            self._num_sent[index] = end
            return text[start:end], []
        content, calls = parse_calls(text, self._tools)
        # around calls, spaces are dropped
        sent = text[:start].lstrip() if calls else text[:start]
        return content[len(sent) :], calls

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self.backend.token_text(token)
        return {"token": text, "logprob": _finite(log_prob), "bytes": None}


class TextExchange(Exchange):
    """Texts to be continued, and perhaps to be scored."""

    kind = ("cmpl", "text_completion", "text_completion")
    body: CompletionBody
    _prompts: list[list[int]]

    @override
    def grammar(self) -> None:
        return None

    @override
    async def requests(self, adapter: RowAdapter, owner: str) -> list[GenerationRequest]:
        body = self.body
        limits = self.backend.engine.limits
        num_completions = len(body.prompts) * body.n
        max_completions = limits.max_rows + limits.max_waiting
        if num_completions > max_completions:  # before they take up memory
            raise RequestError(
                f"a request may have at most {max_completions} completions, got "
                f"{num_completions}; request fewer at once"
            )
        self._prompts = []
        for text in body.prompts:
            self._prompts.append(await self.prepare(self._encode, text))
        choosing = [self.choose(prompt.copy, adapter, owner) for prompt in self._prompts]
        choices = await asyncio.gather(*choosing)
        requests: list[GenerationRequest] = []
        for prompt, choice in zip(self._prompts, choices, strict=True):
            request = GenerationRequest(
                prompt,
                choice,
                owner,
                num_logprobs=body.logprobs,
                turn_end=None,
                scores_prompt=body.echo and body.logprobs is not None,
                makes_tokens=body.max_tokens > 0,
            )
            requests += self.several(request, body.max_tokens)
        self.usage.num_prompt = sum(map(len, self._prompts))
        return requests

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        return encode_prompt(self.backend.tokenizer, Prompt(prompt), raw=True)[0]

    @override
    def choice(self, index: int, answer: Piece) -> dict[str, Any]:
        if not self.body.echo:
            return self._choice(index, answer, [])
        number = index // self.body.n
        prompt = self.body.prompts[number]
        prompt_ids = self._prompts[number]
        if not isinstance(prompt, str):
            prompt = str(self.backend.tokenizer.decode(prompt_ids))
        answer.text = prompt + answer.text
        return self._choice(index, answer, prompt_ids[:1])

    @override
    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece, [])

    def _choice(self, index: int, piece: Piece, first: list[int]) -> dict[str, Any]:
        """A completion or a piece of it; the `first` token has no log-probability."""
        choice: dict[str, Any] = {"index": index, "text": piece.text, "logprobs": None}
        choice["finish_reason"] = piece.finish_reason
        if self.body.logprobs is not None:
            text_of = self.backend.token_text
            tokens = [text_of(token) for token in first]
            log_probs: list[float | None] = [None for _ in first]
            tops: list[dict[str, float] | None] = [None for _ in first]
            for token, log_prob, top in piece.log_probs:
                tokens.append(text_of(token))
                log_probs.append(_finite(log_prob))
                tops.append({text_of(token): _finite(value) for token, value in reversed(top)})
            choice["logprobs"] = {
                "tokens": tokens,
                "token_logprobs": log_probs,
                "top_logprobs": tops,
            }
        return choice | self.told(index, piece)


def chat_prompt(body: ChatBody, adapter: RowAdapter = None, *, is_foreign: bool = True) -> Prompt:
    messages: tuple[Any, ...] = tuple(message.as_turn() for message in body.messages)
    tools: Any = None if body.tool_choice == "none" else body.tools
    return Prompt(messages, adapter, origin="messages", tools=tools, is_foreign=is_foreign)


def _called(calls: list[Function]) -> list[dict[str, Any]]:
    return [
        {
            "index": index,  # of use in a stream
            "id": f"call-{secrets.token_hex(12)}",
            "type": "function",
            "function": call.model_dump(),
        }
        for index, call in enumerate(calls)
    ]


def _finite(log_prob: float) -> float:
    # A log-probability as JSON can write it, which has no infinity and no NaN
    return log_prob if log_prob > -9999 else -9999.0
