"""Conversations, as data sets have them and as a model learns them.

{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
{"prompt": [{"role": "user", "content": "Hi"}],
 "completion": [{"role": "assistant", "content": "Hello!"}]}

An answer is learned after just the text that asks for it. Where a template writes it differently
once more turns follow (without its reasoning, say), a conversation is learned in several texts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loraloom.config.fields import did_you_mean
from loraloom.config.text import parse_json
from loraloom.data.sources import Row, RowError, without_nulls
from loraloom.data.templates import (
    HERMES,
    ChatTemplate,
    Conversation,
    Marked,
    Message,
    accepts_hermes,
    given_source,
)
from loraloom.data.tokens import NO_LOSS, Example, count_shared
from loraloom.errors import DataError, shown

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_USUAL_COLUMNS = ("messages", "conversations", "conversation")
_MESSAGES_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|content)"')  # as CSV has them
# What rendering itself sets.
_FIXED_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "chat_template"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXTS = ("role", "content", "name")
# Roles, and what a message of each may have.
_KEYS = {
    "system": _TEXTS,
    "developer": _TEXTS,
    "user": _TEXTS,
    "assistant": (*_TEXTS, "tool_calls", *_REASONING),
    "tool": (*_TEXTS, "tool_call_id"),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class DroppedToolsError(RowError):
    """A chat template drops the tools of a row, or calls of them, which `hermes` would write."""


class Omission(NamedTuple):
    """What a template may leave out, with a conversation that has it, and one that does not."""

    omitted: str
    complete: Conversation
    reduced: Conversation
    message: int | None = None
    detail: str = ""
    is_of_tools: bool = False

    @property
    def kind(self) -> str:
        return f"{self.omitted}{self.detail}"

    @property
    def name(self) -> str:
        if self.message is None:
            return self.kind
        return f"{self.omitted} of message {self.message + 1}{self.detail}"

    def is_unnoticed(self, template: ChatTemplate) -> bool:
        try:
            return template.render(self.complete) == template.render(self.reduced)
        except TemplateError:
            return False


def read_conversation(row: Row, columns: Mapping[str, str] | None = None) -> Conversation:
    """Read the messages of a row, or its prompt and completion, which alone is learned."""
    names = columns or {}
    messages, num_prompt_messages = _read_turns(row, names)
    system = names.get("system", "system")
    if row.get(system):
        message = {"role": "system", "content": row.text(system)}
        first = messages[0]
        if first["role"] != "system":
            messages.insert(0, message)
            num_prompt_messages += num_prompt_messages > 0
        elif first["content"] != message["content"]:
            row.reject(f"a system message must be in field {system!r} or in the messages")
    tools = read_tools(row, names.get("tools", "tools"))
    variables = read_variables(row, names.get("chat_template_kwargs", "chat_template_kwargs"))
    return Conversation(messages, tools, num_prompt_messages, variables)


def _read_turns(row: Row, names: Mapping[str, str]) -> tuple[list[Message], int]:
    """Read all messages of a row, and count those of its prompt."""
    usual = next((name for name in _USUAL_COLUMNS if row.get(name) is not None), None)
    has_messages = "messages" in names or usual is not None
    is_named = "prompt" in names or "completion" in names
    if is_named or (not has_messages and "completion" in row):
        prompt = read_messages(row, names.get("prompt", "prompt"))
        return prompt + read_answer(row, names.get("completion", "completion")), len(prompt)
    return read_messages(row, names.get("messages") or usual or "messages"), 0


def are_messages(value: object) -> bool:
    """Whether the value of a column is a list of messages, or the JSON text of a list."""
    if isinstance(value, str):
        return _MESSAGES_TEXT.match(value) is not None
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def read_answer(row: Row, field: str) -> list[Message]:
    if not row[field]:
        row.answer(field)  # an error
    return read_messages(row, field)


def read_messages(row: Row, field: str) -> list[Message]:
    turns = row[field]
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # as CSV has them
        turns = _parse(row, f"field {field!r}", turns)
    if not isinstance(turns, list) or not turns:
        expected = f"field {field!r} must be a list of messages"
        row.reject(f"{expected}, got {type(turns).__name__}; name its column with fields", expected)
    return [_read_message(row, number, turn) for number, turn in enumerate(turns, start=1)]


def read_tools(row: Row, field: str) -> list[dict[str, Any]] | None:
    """The tools of a row, a list of JSON schemas or the text of one; None if there are none."""
    tools = _parse(row, f"field {field!r}", row.get(field))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(map(_tool_name, tools)):
        row.reject(f"field {field!r} must be a list of functions with a name each")
    return without_nulls(tools)


def read_variables(row: Row, field: str) -> dict[str, Any] | None:
    """Read the variables of the chat template that a row sets, such as `enable_thinking`."""
    variables = _parse(row, f"field {field!r}", row.get(field))
    if not variables:
        return None
    if not isinstance(variables, Mapping):
        expected = f"field {field!r} must be an object"
        row.reject(f"{expected}, got {shown(variables)}", expected)
    fixed = sorted(_FIXED_VARIABLES & variables.keys())
    if fixed:
        row.reject(f"field {field!r} must not set {', '.join(fixed)}; remove {fixed[0]}")
    return without_nulls(variables)


def _read_message(row: Row, number: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        reason = f"message {number} must be an object, got {type(turn).__name__}"
        row.reject(reason, "a message must be an object")
    # tables put a null where an object lacks a key of others
    fields = {key: value for key, value in turn.items() if value is not None}
    message = Row(fields, f"{row.origin}, message {number}")
    if "from" in message:
        message = _from_sharegpt(message)
    role = message.text("role")
    if role not in _KEYS:
        hint = did_you_mean(role, _KEYS)
        expected = f"role must be one of {', '.join(_KEYS)}"
        message.reject(f"{expected}, got {shown(role)}{hint}", expected)
    _check_keys(message, _KEYS[role], f"a message of role {role!r}")
    read: Message = {}
    for key in ("role", "name", "tool_call_id"):
        if key in message:
            read[key] = message.text(key)
    if message.get("tool_calls"):
        read["tool_calls"] = _read_calls(message)
    reasoning = [key for key in _REASONING if message.get(key)]
    if reasoning:
        read["reasoning_content"] = message.text(reasoning[0])
    if role == "assistant" and "content" not in message:
        read["content"] = ""
    else:
        read["content"] = _read_content(message)
    says_more = "tool_calls" in read or "reasoning_content" in read
    if role == "assistant" and not says_more and not read["content"].strip():
        message.reject_empty("the assistant's turn is empty")
    return read


def _from_sharegpt(turn: Row) -> Row:
    _check_keys(turn, ("from", "value"), "a turn with 'from'")
    speaker = turn.text("from")
    if speaker not in _SHAREGPT_ROLES:
        expected = f"'from' must be one of {', '.join(_SHAREGPT_ROLES)}"
        turn.reject(f"{expected}, got {shown(speaker)}", expected)
    role = _SHAREGPT_ROLES[speaker]
    value = turn.get("value", "") if role == "assistant" else turn["value"]
    if speaker != "function_call":
        return Row({"role": role, "content": value}, turn.origin)
    calls = _parse(turn, "field 'value'", value)
    if not isinstance(calls, list):
        calls = [calls]
    return Row({"role": role, "content": "", "tool_calls": calls}, turn.origin)


def _read_content(message: Row) -> str:
    content = message["content"]
    if not isinstance(content, list):
        return message.text("content")
    texts: list[str] = []
    for text in content:
        if isinstance(text, Mapping):
            text = text.get("text")
        if not isinstance(text, str):
            message.reject("field 'content' must be a text or a list of texts, got other parts")
        texts.append(text)
    return "".join(texts)


def _read_calls(message: Row) -> list[dict[str, Any]]:
    """Calls in the form that templates read: the arguments an object, not its text."""
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(map(_tool_name, calls)):
        message.reject("field 'tool_calls' must be a list of calls of a function with a name")
    read = []
    for call in calls:
        function = call.get("function") or call
        arguments = _parse(message, "arguments of a tool call", function.get("arguments") or {})
        if not isinstance(arguments, Mapping):
            message.reject("the arguments of a tool call must be an object or the text of one")
        function = {"name": function["name"], "arguments": dict(arguments)}
        call_id = {"id": call["id"]} if call.get("id") else {}
        read.append({**call_id, "type": "function", "function": function})
    return read


def _tool_name(tool: Any) -> str | None:
    if not isinstance(tool, Mapping):
        return None
    function = tool.get("function") or tool
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _check_keys(message: Row, allowed: tuple[str, ...], name: str) -> None:
    for key in message:
        if key not in allowed:
            hint = did_you_mean(key, allowed) or f"; it may have {', '.join(allowed)}"
            message.reject(f"{name} has the unknown key {shown(key)}{hint}")


def _parse(row: Row, name: str, value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return parse_json(value, name, DataError)
    except DataError as error:
        row.reject(str(error), f"{name} must be JSON")


def learn_answers(template: ChatTemplate, row: Row, conversation: Conversation) -> list[Example]:
    """A conversation in full length: loss on the assistant's turns after the prompt."""
    first = conversation.num_prompt_messages
    roles = [message["role"] for message in conversation.messages]
    turns = [turn for turn, role in enumerate(roles) if role == "assistant" and turn >= first]
    if not turns:
        row.reject("the conversation has no assistant message to learn from; add an answer")
    if turns[0] == 0:
        row.reject("a conversation must not start with an assistant message; add a user message")
    try:
        _check_omissions(template, row, conversation)
        if _GENERATION_TAG.search(template.source(conversation.tools)):
            texts = [_marked_text(template, row, conversation)]
        else:
            texts = _answered_texts(template, row, conversation, turns)
    except TemplateError as error:
        row.reject(f"the chat template rejects the row: {error}; change the row or chat_template")
    return [_learn_spans(template.tokenizer, text) for text in texts]


def _check_omissions(template: ChatTemplate, row: Row, conversation: Conversation) -> None:
    for omission in _omissions(conversation):
        if not omission.is_unnoticed(template):
            continue
        reason = f"the chat template drops {omission.name}"
        kind = f"the chat template drops {omission.kind}"
        if omission.is_of_tools and _is_written_by_hermes(template.tokenizer, conversation):
            advice = f"set chat_template: {HERMES} (loraloom init: --chat-template {HERMES})"
            raise DroppedToolsError(f"{row.origin}: {reason}; {advice}", f"{kind}; {advice}")
        row.reject(f"{reason}; set another chat_template", kind)


def _is_written_by_hermes(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> bool:
    if not accepts_hermes(tokenizer):
        return False
    template = ChatTemplate(tokenizer, given_source(tokenizer, HERMES))
    return not any(omission.is_unnoticed(template) for omission in _omissions(conversation))


def _marked_text(template: ChatTemplate, row: Row, chat: Conversation) -> Marked:
    text, marks = template.render_with_marks(chat)
    first = chat.num_prompt_messages
    if first:
        start = count_shared(text, template.render(chat.until(first)))
        marks = [mark for mark in marks if mark[0] >= start]
    if not any(end > begin for begin, end in marks):
        row.reject("the chat template's {% generation %} marks do not enclose the answer")
    return text, marks


def _answered_texts(
    template: ChatTemplate, row: Row, conversation: Conversation, turns: Sequence[int]
) -> list[Marked]:
    """As few texts as have every answer as it would be generated."""
    answers: list[tuple[str, str]] = []
    for turn in turns:
        prompt = template.render(conversation.until(turn), for_answer=True)
        answered = template.render(conversation.until(turn + 1))
        answers.append((prompt, answered))
        if not answered.startswith(prompt):
            shared = count_shared(prompt, answered)
            row.reject(
                f"the generation prompt for message {turn + 1} continues with "
                f"{shown(prompt[shared:])}, but the rendered answer with "
                f"{shown(answered[shared : shared + 30])}; set another chat_template",
                kind="the generation prompt continues unlike the rendered answer",
            )
    closing = template.closing()
    texts: list[Marked] = []
    while answers:
        text = answers[-1][1]
        spans: list[tuple[int, int]] = []
        left: list[tuple[str, str]] = []
        for prompt, answered in answers:
            ending = answered if text.startswith(answered) else answered.removesuffix(closing)
            if text.startswith(ending):
                spans.append((len(prompt), len(ending)))
            else:
                left.append((prompt, answered))
        texts.append((text, spans))
        answers = left
    return texts[::-1]


def _learn_spans(tokenizer: PreTrainedTokenizerBase, marked: Marked) -> Example:
    """The tokens of a text; those that reach into a span are learned."""
    text, spans = marked
    if not tokenizer.is_fast:
        got = type(tokenizer).__name__
        raise DataError(f"chat data requires a fast tokenizer, which locates tokens, got {got}")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = []
    for token, (begin, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        is_learned = any(start < stop and begin < stop and end > start for start, stop in spans)
        labels.append(token if is_learned else NO_LOSS)
    return Example(tuple(encoding["input_ids"]), tuple(labels))


def omitted_tools(conversation: Conversation) -> Iterator[Omission]:
    if conversation.tools:
        without = conversation._replace(tools=None)
        yield Omission("the tools", conversation, without, is_of_tools=True)
    for index, message in enumerate(conversation.messages):
        if message.get("tool_calls"):
            without = conversation.changed(index, tool_calls=[])
            yield Omission("the tool_calls", conversation, without, index, is_of_tools=True)


def _omissions(conversation: Conversation) -> Iterator[Omission]:
    yield from omitted_tools(conversation)
    for index, message in enumerate(conversation.messages):
        role = message["role"]
        content = message["content"]
        # of earlier answers, templates leave out reasoning and what is beside calls on purpose
        within = conversation.until(index + 1) if role == "assistant" else conversation
        changed = within.changed(index, content=f"{content}?")
        if message.get("tool_calls") and content.strip():
            detail = ", next to its tool_calls"
            yield Omission("the content", within, changed, index, detail)
        elif role not in ("user", "assistant"):
            yield Omission("the content", within, changed, index, f", of role {role!r}")
        if role == "assistant" and index >= conversation.num_prompt_messages:
            if "reasoning_content" in message:
                silent = within.changed(index, reasoning_content="")
                yield Omission("the reasoning", within, silent, index)
            elif "</think>" in content:
                answer = content.rpartition("</think>")[2]
                yield Omission(
                    "the reasoning", within, within.changed(index, content=answer), index
                )
