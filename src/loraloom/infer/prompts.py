"""Prompts, and the tokens that a model reads of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loraloom.data.chat_template import load_chat_template
from loraloom.data.messages import Conversation, Message
from loraloom.data.tokenising import encode_texts
from loraloom.errors import DataError, shown
from loraloom.models.layout import RowAdapter


@dataclass(frozen=True)
class Prompt:
    """What one completion answers.

    Args:
        content: A text, or the turns of a conversation.
        adapter: Name of the adapter that answers, perhaps with a scale; None is the base model.
        origin: Where it comes from, for messages: a file and line, say.
        tools: JSON schemas of the functions that a conversation's answer may call.
    """

    content: str | tuple[Message, ...]
    adapter: RowAdapter = None
    origin: str = "prompt"
    tools: list[dict[str, Any]] | None = None


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, raw: bool = False
) -> list[int]:
    """Token ids of a prompt.

    A text is the user's turn in the tokenizer's chat template where there is one, and else is read
    as it stands.
    """
    if stands_alone(tokenizer, prompt, raw=raw):
        ids = encode_texts(tokenizer, [_checked(str(prompt.content), prompt)])[0]
    else:
        text = _render(tokenizer, prompt)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"{prompt.origin}: the prompt must not be empty")
    return ids


def stands_alone(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, raw: bool) -> bool:
    """Whether a prompt is a text that is read as it stands, without a chat template."""
    return isinstance(prompt.content, str) and (raw or not tokenizer.chat_template)


def is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON and command lines may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(text: str, prompt: Prompt) -> str:
    if not is_unicode(text):
        raise DataError(
            f"{prompt.origin}: the prompt must be a text of Unicode, got half a surrogate pair in "
            f"{shown(text)}; write it in UTF-8"
        )
    return text


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    content = prompt.content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    for message in messages:
        _checked(message["content"], prompt)
    try:
        template = load_chat_template(tokenizer)
        return template.render(Conversation(messages, prompt.tools), for_answer=True)
    except DataError as error:
        raise DataError(f"{prompt.origin}: {error}") from None
    except TemplateError as error:
        raise DataError(
            f"{prompt.origin}: the messages do not fit the chat template: {error}"
        ) from error
