"""Calls of tools, which models write in the notations of their families:

    <tool_call>{"name": …, "arguments": {…}}</tool_call>     Hermes, Qwen, SmolLM3; perhaps several
    [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]          Mistral
    {"name": …, "parameters": {…}}                           Llama 3

A text that is none of these, or names a tool that wasn't offered, stays a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from openai.types.chat.chat_completion_message_function_tool_call import Function

_OPENING = "<tool_call>"
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
# Where a call may begin: anywhere in an answer, and at its start.
_BEGINNING = re.compile(r"<tool_call>|<\w*\Z")
_START = re.compile(rf"\s*(?:[\[{{]|<\||{_BEGINNING.pattern}|\Z)")
_MARKERS = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")


def parse_calls(text: str, names: Collection[str]) -> tuple[str, list[Function]]:
    """Take an answer apart: the text around calls, and the calls."""
    if _OPENING in text:
        parts, content = _BLOCK.findall(text), _BLOCK.sub("", text).strip()
    else:
        parts, content = [_MARKERS.sub("", text, count=1)], ""
    try:
        values = [json.loads(part.strip()) for part in parts]
        listed = [value if isinstance(value, list) else [value] for value in values]
        calls = [_call(one, names) for part in listed for one in part]
    except (ValueError, RecursionError):
        return text, []
    found = [call for call in calls if call is not None]
    return (content, found) if found and len(found) == len(calls) else (text, [])


def _call(value: Any, names: Collection[str]) -> Function | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON
        arguments = json.loads(arguments)
    is_call = isinstance(arguments, dict)
    return Function(name=value["name"], arguments=json.dumps(arguments)) if is_call else None


class CallStream:
    """Holds text back from where a call may begin; at the end, it is one or it isn't."""

    def __init__(self, names: Collection[str]):
        self._names = names
        self._is_begun = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take more of the answer, and return what is text for certain."""
        self._held += text
        start = None if self._is_begun else _START.match(self._held)
        start = start or _BEGINNING.search(self._held)
        settled = self._held[: start and start.start()]
        self._is_begun |= bool(settled)
        self._held = self._held[len(settled) :]
        return settled

    def finish(self) -> tuple[str, list[Function]]:
        return parse_calls(self._held, self._names)
