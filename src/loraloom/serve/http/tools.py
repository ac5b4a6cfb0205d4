"""Calls of tools, and answers that keep to a JSON schema.

Models write calls in the notations of their families:

    <tool_call>{"name": …, "arguments": {…}}</tool_call>     Hermes, Qwen, SmolLM3; perhaps several
    [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]          Mistral
    {"name": …, "parameters": {…}}                           Llama 3

A text that is none of these, or names a tool that wasn't offered, stays a text.

Axes: V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import llguidance
import torch
from llguidance.hf import from_tokenizer
from openai.types.chat.chat_completion_message_function_tool_call import Function
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.errors import ConfigError
from loraloom.generation.prompts import is_unicode
from loraloom.serve.http.schemas import Tool

_OPENING = "<tool_call>"
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_BARE_STARTS = ("{", "[", "<|python_tag|>")
_MARKERS = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")
# Python's own way of writing JSON; where any space is allowed, small models never end.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Said(NamedTuple):
    """An answer taken apart: text around calls, and the calls."""

    content: str
    calls: list[Function]


def parse_calls(text: str, names: Collection[str]) -> Said:
    if _OPENING in text:
        parts, content = _BLOCK.findall(text), _BLOCK.sub("", text).strip()
    else:
        parts, content = [_MARKERS.sub("", text, count=1)], ""
    calls: list[Function] = []
    for part in parts:
        try:
            value = json.loads(part.strip())
        except (ValueError, RecursionError):
            return Said(text, [])
        for one in value if isinstance(value, list) else [value]:
            call = _call(one, names)
            if call is None:
                return Said(text, [])
            calls.append(call)
    return Said(content, calls) if calls else Said(text, [])


def _call(value: Any, names: Collection[str]) -> Function | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON
        has_text = is_unicode(arguments)
        return Function(name=value["name"], arguments=arguments) if has_text else None
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    text = text if is_unicode(text) else json.dumps(arguments)  # half a surrogate pair
    return Function(name=value["name"], arguments=text)


class CallStream:
    """Holds text back from where a call may begin; at the end, it is one or it isn't."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._said = ""
        self._held = ""

    def push(self, text: str) -> str:
        """Take more of the answer, and return what is text for certain."""
        self._held += text
        settled = self._held[: self._start()]
        self._held = self._held[len(settled) :]
        self._said += settled
        return settled

    def finish(self) -> Said:
        return parse_calls(self._held, self._names)

    def _start(self) -> int:
        """Where in the text that is held back a call may begin."""
        begun = self._held.lstrip()
        if not self._said.strip() and any(
            begun.startswith(start) or start.startswith(begun) for start in _BARE_STARTS
        ):
            return 0
        place = self._held.find(_OPENING)
        if place >= 0:
            return place
        sizes = range(min(len(_OPENING) - 1, len(self._held)), 0, -1)
        partial = next((size for size in sizes if _OPENING.startswith(self._held[-size:])), 0)
        return len(self._held) - partial


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    places = ["#"] if len(tools) == 1 else [f"#/anyOf/{number}" for number in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": _moved(arguments_schema(tool), f"{place}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """Let the references within a schema lead to where it is inside of another one."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, place) for key, part in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved


def arguments_schema(tool: Tool) -> dict[str, Any]:
    return {"type": "object", **(tool["function"].get("parameters") or {})}


def schema_reader(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int]
) -> Callable[[dict[str, Any]], JsonConstraint]:
    """Give what compiles JSON schemas for a tokenizer."""
    known: Any = from_tokenizer(
        tokenizer,  # pyright: ignore[reportArgumentType]
        n_vocab=max(vocab_size, len(tokenizer)),  # ids beyond the embedding are cut off
        eos_token=end_tokens,
    )

    def read(schema: dict[str, Any]) -> JsonConstraint:
        try:
            text = json.dumps(schema)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=_SPACING)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema can't be used: {error}") from None
        matcher = llguidance.LLMatcher(known, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema can't be used: {matcher.get_error()}")
        return JsonConstraint(matcher)

    return read


@dataclass
class JsonConstraint:
    """The tokens that may follow in one completion."""

    matcher: Any

    def copy(self) -> JsonConstraint:
        return JsonConstraint(self.matcher.deep_copy())

    def allowed(self, num_tokens: int) -> Tensor:
        biases = bytearray(self.matcher.compute_logit_bias())
        if self.matcher.is_error():
            raise ConfigError(f"the JSON schema can't be kept: {self.matcher.get_error()}")
        known = torch.frombuffer(biases, dtype=torch.uint8)[:num_tokens].bool()
        return torch.nn.functional.pad(known, (0, num_tokens - len(known)))

    def accept(self, token: int) -> bool:
        if not self.matcher.consume_token(token):
            raise ConfigError(f"the JSON schema can't be kept: {self.matcher.get_error()}")
        return self.matcher.is_stopped()
