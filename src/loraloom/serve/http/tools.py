"""Calls of tools, which models write in the notations of their families.

    <tool_call>{"name": …, "arguments": {…}}</tool_call>     Hermes, Qwen, SmolLM3; perhaps several
    <tool_call><function=NAME><parameter=KEY>…               Qwen3-Coder, with closing tags
    [TOOL_CALLS] [{"name": …, "arguments": {…}}, …]          Mistral
    [TOOL_CALLS]NAME[ARGS]{…}                                newer Mistral; perhaps several
    {"name": …, "parameters": {…}}                           Llama 3

A text that is none of these, or names a tool that wasn't offered, stays a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from openai.types.chat.chat_completion_message_function_tool_call import Function

# Of each tool, by its name, the JSON schema of its parameters.
Tools = Mapping[str, Any]
_OPENING = "<tool_call>"
_LISTING = "[TOOL_CALLS]"
_PYTHON_TAG = "<|python_tag|>"
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MARKERS = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*")
_FUNCTION = re.compile(r"<function=([^>\n]+)>")
_PARAMETER = "<parameter="
_NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)")


def parse_calls(text: str, tools: Tools) -> tuple[str, list[Function]]:
    """Take an answer apart: the text around calls, and the calls."""
    if _OPENING in text:
        blocks = _BLOCK.findall(text)
        content = _BLOCK.sub("", text).strip()
    elif _LISTING in text:
        content, *blocks = text.split(_LISTING)
    else:
        blocks = [_MARKERS.sub("", text, count=1)]
        content = ""
    try:
        calls = []
        for block in blocks:
            calls += [_call(value, tools) for value in _read_values(block, tools)]
    except (ValueError, RecursionError):
        return text, []
    return (content.strip(), calls) if calls else (text, [])


def find_settled(text: str, start: int, tools: Tools) -> int:
    """Find the end of the text after `start` that no call can begin in; spaces before one go."""
    end = len(text)
    for marker in (_OPENING, _LISTING):
        index = text.find(marker, start)
        if index < 0:
            index = len(text) - _num_common(text[start:], marker)
        end = min(end, index)
    num_settled = len(text[start:end].rstrip())
    # of many tools, none is compared with a text that waits anyway
    if start == 0 and num_settled and _may_be_call(text.lstrip(), tools):
        return 0
    return start + num_settled


def _may_be_call(text: str, tools: Tools) -> bool:
    """Whether a whole answer that begins like this may be a call without an opening marker."""
    for start in ("{", "[", _PYTHON_TAG, *tools):
        if text.startswith(start) or start.startswith(text):
            return True
    return False


def _num_common(text: str, marker: str) -> int:
    """Count the characters at the end of a text with which a marker begins."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0


def _read_values(text: str, tools: Tools) -> Iterator[Any]:
    """The objects of calls, from the text between the marks of a notation."""
    text = text.strip()
    function = _FUNCTION.match(text)
    named = _NAMED.match(text)
    if function is not None:
        parameters = _read_parameters(text[function.end() :].removesuffix("</function>"))
        schema = tools.get(function[1])
        schemas = schema.get("properties") if isinstance(schema, dict) else None
        if not isinstance(schemas, dict):
            schemas = {}
        arguments = {key: _convert(value, schemas.get(key)) for key, value in parameters.items()}
        yield {"name": function[1], "arguments": arguments}
    elif named is not None:
        yield {"name": named[1], "arguments": json.loads(text[named.end() :])}
    else:
        value = json.loads(text)
        yield from value if isinstance(value, list) else [value]


def _read_parameters(text: str) -> dict[str, str]:
    """The texts of parameters by key; a pattern would look for each one's end up to the last."""
    *blocks, rest = text.split("</parameter>")
    parameters = {}
    for block in blocks:
        opening, _, value = block.lstrip().partition(">")
        key = opening.removeprefix(_PARAMETER)
        if key in ("", opening) or "\n" in key:
            raise ValueError("a parameter must have a key")
        parameters[key] = value.removeprefix("\n").removesuffix("\n")
    if rest.strip():
        raise ValueError("a parameter must have an end")
    return parameters


def _convert(text: str, schema: Any) -> Any:
    """The value of a parameter: its text, unless the schema has only other types."""
    types = _types_in(schema)
    if isinstance(schema, dict) and isinstance(schema.get("anyOf"), list):
        for branch in schema["anyOf"]:
            types += _types_in(branch)
    if not types or "string" in types:
        return text
    try:
        return json.loads(text.lower() if types[0] == "boolean" else text)
    except (ValueError, RecursionError):
        return text


def _types_in(schema: object) -> list[object]:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if isinstance(kind, str):
        return [kind]
    return list(kind) if isinstance(kind, list) else []


def _call(value: Any, tools: Tools) -> Function:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in tools:
        raise ValueError("a call must name a tool that was offered")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON within JSON
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments must be an object")
    return Function(name=name, arguments=json.dumps(arguments))
