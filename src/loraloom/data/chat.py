"""Conversations in the tokenizer's own chat template; what the assistant says is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loraloom.data.encoding import EncodedRow, LearntTokens, fit
from loraloom.data.rows import Row
from loraloom.data.tokenising import leading_tokens
from loraloom.errors import DataError

Message = dict[str, str]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_messages(row: Row, field: str) -> list[Message]:
    """The turns of a conversation: a list of objects with `role` and `content`.

    Raises:
        DataError: If the field is missing or of another form.
    """
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        row.reject(f"field {field!r} must be a list of messages, got {type(turns).__name__}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            row.reject(f"message {number} must be an object, got {type(turn).__name__}")
        message = Row(turn, f"{row.origin}, message {number}")
        messages.append({"role": message.text("role"), "content": message.text("content")})
    return messages


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], field: str, max_length: int
) -> list[EncodedRow]:
    """Conversations with a loss on what the assistant says, its end-of-turn token included.

    Where the template marks these tokens with `{% generation %}`, its marks are taken. Else they
    are what each assistant's turn adds to the text of the turns before.

    Args:
        tokenizer: With a chat template.
        rows: Each with a list of messages.
        field: Name of that list.
        max_length: Most tokens of a row; see `fit`.

    Raises:
        DataError: If there is no template, a row can't be put into it, or the template changes
            earlier turns so that the assistant's part can't be told apart.
    """
    start = leading_tokens(tokenizer)
    encoded = []
    for row in rows:
        answered = learn_answers(tokenizer, row, read_messages(row, field))
        encoded.append(fit(answered.ids, answered.is_learnt, start, max_length))
    return encoded


def learn_answers(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: list[Message], first: int = 0
) -> LearntTokens:
    """A conversation in full length: loss on the assistant's turns from message `first` on.

    Raises:
        DataError: As `encode_conversations`.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer must have a chat template for messages, it has none; "
            "set tokenizer.chat_template or write the conversations out as texts"
        )
    if _GENERATION_TAG.search(tokenizer.get_chat_template()):
        num_answers = sum(message["role"] == "assistant" for message in messages[first:])
        marked = _marked_tokens(tokenizer, row, messages)
        return LearntTokens(marked.ids, _last_runs(marked.is_learnt, num_answers))
    return _added_tokens(tokenizer, row, messages, first)


def _last_runs(is_learnt: Sequence[bool], count: int) -> list[bool]:
    """Keep the marks of the last `count` spans."""
    starts = [
        place
        for place, learnt in enumerate(is_learnt)
        if learnt and (place == 0 or not is_learnt[place - 1])
    ]
    kept = starts[-count:] if count else []
    first = kept[0] if kept else len(is_learnt)
    return [learnt and place >= first for place, learnt in enumerate(is_learnt)]


def _marked_tokens(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: list[Message]
) -> LearntTokens:
    try:
        encoding: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        row.reject(f"the conversation does not fit the chat template: {error}")
    return LearntTokens(encoding["input_ids"], [bool(mark) for mark in encoding["assistant_masks"]])


def _added_tokens(
    tokenizer: PreTrainedTokenizerBase, row: Row, messages: list[Message], first: int
) -> LearntTokens:
    text = _render(tokenizer, row, messages)
    spans = [
        _answer_span(tokenizer, row, messages, position, text)
        for position, message in enumerate(messages)
        if message["role"] == "assistant" and position >= first
    ]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_learnt = [
        any(begin < end and token_begin < end and token_end > begin for begin, end in spans)
        for token_begin, token_end in encoding["offset_mapping"]
    ]
    return LearntTokens(encoding["input_ids"], is_learnt)


def _answer_span(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    messages: list[Message],
    position: int,
    text: str,
) -> tuple[int, int]:
    """Where the assistant's turn at `position` stands in the text of the whole conversation."""
    if position == 0:
        row.reject("a conversation must not begin with the assistant's turn")
    before = _render(tokenizer, row, messages[:position], for_answer=True)
    after = _render(tokenizer, row, messages[: position + 1])
    if not after.startswith(before) or not text.startswith(after):
        row.reject(
            f"the chat template writes earlier turns differently once message {position + 1} "
            "follows, so the assistant's tokens can't be told apart; give the tokenizer a template "
            "with {% generation %} marks"
        )
    return len(before), len(after)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    messages: list[Message],
    *,
    for_answer: bool = False,
) -> str:
    try:
        text: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=for_answer
        )
    except (TemplateError, TypeError, ValueError) as error:
        row.reject(f"the conversation does not fit the chat template: {error}")
    return text
