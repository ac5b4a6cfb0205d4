"""Conversations as data sets have them, in one form: that of OpenAI's and transformers' messages.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from loraloom.config.fields import did_you_mean
from loraloom.config.text import parse_json
from loraloom.data.sources import Row
from loraloom.errors import DataError, shown

Message = dict[str, Any]
"""`role` and `content`; `tool_calls` and `reasoning_content` where an assistant's turn has them."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_KEYS = ("role", "content", "name")
_KEYS = {
    **dict.fromkeys(("system", "developer", "user"), _TEXT_KEYS),
    "assistant": (*_TEXT_KEYS, "tool_calls", *_REASONING),
    "tool": (*_TEXT_KEYS, "tool_call_id"),
}
"""Roles, and what a message of each may have."""

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


class Conversation(NamedTuple):
    """Messages, and the tools that they may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def read_conversation(row: Row, columns: Mapping[str, str] | None = None) -> Conversation:
    """A row's conversation, in whichever of the usual forms."""
    names, usual = columns or {}, ("messages", "conversations", "conversation")
    found = next((name for name in usual if row.get(name) is not None), usual[0])
    messages = read_messages(row, names.get("messages", found))
    instructions = names.get("system", "system")
    if row.get(instructions):
        text = row.text(instructions)
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": text})
        elif messages[0]["content"] != text:
            row.reject(
                f"a system message must stand in field {instructions!r} or in the messages; remove "
                "one"
            )
    return Conversation(messages, read_tools(row, names.get("tools", "tools")))


def read_messages(row: Row, field: str) -> list[Message]:
    """The turns of a conversation, each an object with `role` and `content`, or ShareGPT's."""
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        row.reject(
            f"field {field!r} must be a list of messages, got {type(turns).__name__}; name the "
            f"column that has them with fields: {{messages: COLUMN}}"
        )
    return [_read_message(row, number, turn) for number, turn in enumerate(turns, start=1)]


def read_tools(row: Row, field: str) -> list[dict[str, Any]] | None:
    """The tools of a row, a list of JSON schemas or the text of one; None if there are none."""
    tools = _parse(row, f"field {field!r}", row.get(field))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(map(_tool_name, tools)):
        row.reject(f"field {field!r} must be a list of functions with a name each")
    return _without_nulls(tools)


def _read_message(row: Row, number: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        row.reject(f"message {number} must be an object, got {type(turn).__name__}")
    # tables put a null where an object lacks a key of others
    given = {key: value for key, value in turn.items() if value is not None}
    message = Row(given, f"{row.origin}, message {number}")
    if "from" in message:
        message = _from_sharegpt(message)
    role = message.text("role")
    if role not in _KEYS:
        hint = did_you_mean(role, _KEYS)
        message.reject(f"role must be one of {', '.join(_KEYS)}, got {shown(role)}{hint}")
    _check_keys(message, _KEYS[role], f"a message of role {role!r}")
    texts = ("role", "name", "tool_call_id")
    read: Message = {key: message.text(key) for key in texts if key in message}
    if message.get("tool_calls"):
        read["tool_calls"] = _read_calls(message)
    if reasoning := next((message.text(key) for key in _REASONING if message.get(key)), ""):
        read["reasoning_content"] = reasoning
    says_more = "tool_calls" in read or "reasoning_content" in read
    read["content"] = "" if says_more and "content" not in message else _read_content(message)
    if role == "assistant" and not says_more and not read["content"].strip():
        message.reject_empty("the assistant's turn is empty")
    return read


def _from_sharegpt(turn: Row) -> Row:
    _check_keys(turn, ("from", "value"), "a turn with 'from'")
    speaker = turn.text("from")
    if speaker not in _SHAREGPT_ROLES:
        turn.reject(f"'from' must be one of {', '.join(_SHAREGPT_ROLES)}, got {shown(speaker)}")
    message = {"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]}
    if speaker == "function_call":
        calls = _parse(turn, "field 'value'", turn["value"])
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return Row(message, turn.origin)


def _read_content(message: Row) -> str:
    """The content as a text; a list of text parts is joined."""
    content = message["content"]
    if not isinstance(content, list):
        return message.text("content")
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        message.reject(
            "field 'content' must be a text or a list of texts, got other parts in it; remove them"
        )
    return "".join(texts)


def _read_calls(message: Row) -> list[dict[str, Any]]:
    """Calls in the form that templates read: the arguments an object, not its text."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(map(_tool_name, calls)):
        message.reject("field 'tool_calls' must be a list of calls of a function with a name")
    read = []
    for call in calls:
        function = call.get("function") or call
        given = function.get("arguments") or {}
        arguments = _parse(message, "arguments of a tool call", given)
        if not isinstance(arguments, Mapping):
            message.reject("the arguments of a tool call must be an object or the text of one")
        identity = {"id": call["id"]} if call.get("id") else {}
        called = {"name": function["name"], "arguments": dict(arguments)}
        read.append({**identity, "type": "function", "function": called})
    return read


def _tool_name(tool: Any) -> str | None:
    """The name of a tool or of a call, which may stand inside `function`."""
    function = (tool.get("function") or tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _check_keys(message: Row, known: tuple[str, ...], what: str) -> None:
    unknown = next((key for key in message if key not in known), None)
    if unknown is not None:
        hint = did_you_mean(unknown, known) or f"; it may have {', '.join(known)}"
        message.reject(f"{what} has the unknown key {shown(unknown)}{hint}")


def _parse(row: Row, what: str, value: Any) -> Any:
    """A value that may be written as the text of its JSON."""
    is_text = isinstance(value, str) and value.strip()
    return parse_json(value, f"{row.origin}, {what}", DataError) if is_text else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
