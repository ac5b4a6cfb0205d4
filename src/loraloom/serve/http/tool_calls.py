"""Calls of tools in what a model writes, in the notations of its family.

    <tool_call>{"name": …, "arguments": {…}}</tool_call>     Hermes, Qwen, SmolLM3; perhaps several
    [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]          Mistral
    {"name": …, "parameters": {…}}                           Llama 3

A text that is none of these, or names a tool that wasn't offered, stays a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from loraloom.generation.prompts import is_unicode
from loraloom.serve.http.objects import FunctionCall, Tool

_OPENING = "<tool_call>"
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_BARE_STARTS = ("{", "[", "<|python_tag|>")
_MARKERS = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")


class Said(NamedTuple):
    """An answer taken apart: text around calls, and the calls."""

    content: str
    calls: list[FunctionCall]


def parse_calls(text: str, names: Collection[str]) -> Said:
    """Find the calls in a whole answer."""
    if _OPENING in text:
        found = [_calls_in(block, names) for block in _BLOCK.findall(text)]
        content = _BLOCK.sub("", text).strip()
    else:
        marker = _MARKERS.match(text)
        found = [_calls_in(text[marker.end() if marker else 0 :], names)]
        content = ""
    calls = [call for calls in found for call in calls or ()]
    return Said(content, calls) if calls and None not in found else Said(text, [])


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
        """Return what was held back, as text and calls."""
        return parse_calls(self._held, self._names)

    def _start(self) -> int:
        """Where in the text that is held back a call may begin."""
        lead = len(self._held) - len(self._held.lstrip())
        if not self._said.strip() and (
            lead == len(self._held) or _begins(self._held[lead:], _BARE_STARTS)
        ):
            return 0
        place = self._held.find(_OPENING)
        if place >= 0:
            return place
        sizes = range(min(len(_OPENING) - 1, len(self._held)), 0, -1)
        partial = next((size for size in sizes if _OPENING.startswith(self._held[-size:])), 0)
        return len(self._held) - partial


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of one call of any of some tools."""
    places = ["#"] if len(tools) == 1 else [f"#/anyOf/{number}" for number in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
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
    """The JSON schema of a tool's arguments, which are an object."""
    return {"type": "object", **(tool.function.parameters or {})}


def _begins(text: str, starts: Sequence[str]) -> bool:
    """Whether a text begins like one of some others, as far as it goes."""
    return any(text.startswith(start) or start.startswith(text) for start in starts)


def _calls_in(text: str, names: Collection[str]) -> list[FunctionCall] | None:
    """Read JSON of a call, or of a list of them; None if it is something else."""
    try:
        value = json.loads(text.strip())
    except (ValueError, RecursionError):
        return None
    values = value if isinstance(value, list) else [value]
    calls = [_call(value, names) for value in values]
    return None if None in calls else [call for call in calls if call is not None]


def _call(value: Any, names: Collection[str]) -> FunctionCall | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON
        has_text = is_unicode(arguments)
        return FunctionCall(name=value["name"], arguments=arguments) if has_text else None
    if not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    text = text if is_unicode(text) else json.dumps(arguments)  # half a surrogate pair
    return FunctionCall(name=value["name"], arguments=text)
