"""A chat template: how a conversation is written out for a model.

It renders as `tokenizer.apply_chat_template` does. `for_answer` ends the text where the model's
answer begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from typing import Any

from jinja2 import Template, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from loraloom.data.messages import Conversation, Message
from loraloom.data.templates import read_template, render, template_errors
from loraloom.errors import DataError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

TRAINING_DAY = date(2024, 7, 26)
"""What templates take for today in training, as Llama 3.2's does by default: the same rows are the
same tokens tomorrow, and the same ones are held out."""

TRL = "trl"
"""In place of a template: the one that trl has for training with the tokenizer's."""

Span = tuple[int, int]
"""Where a part of a text begins and ends, in characters."""


class ChatTemplate:
    """A chat template with the special tokens of a tokenizer."""

    def __init__(
        self,
        source: str,
        tool_source: str,
        special_tokens: Mapping[str, Any],
        day: date | None = None,
    ):
        self._day = {} if day is None else {"strftime_now": day.strftime}
        self._templates = {False: _compile(source), True: _compile(tool_source)}
        self._special_tokens = special_tokens
        self._sources = {False: source, True: tool_source}

    @property
    def end_of_text(self) -> str:
        """The tokenizer's EOS token, empty if it has none."""
        return str(self._special_tokens.get("eos_token", ""))

    def marks_answers(self, conversation: Conversation) -> bool:
        """Whether the template says itself what the assistant's part is, by `{% generation %}`."""
        source = self._sources[conversation.tools is not None]
        return _GENERATION_TAG.search(source) is not None

    def render(self, conversation: Conversation, *, for_answer: bool = False) -> str:
        """The text of a conversation."""
        return render(self._template(conversation), self._fields(conversation, for_answer))

    def render_with_marks(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text of a conversation, and where the template marks the assistant's parts in it."""
        template, marks = self._template(conversation), []
        blocks: list[str] = []
        environment: Any = template.environment
        with template_errors(), environment.activate_tracker(blocks, marks):
            for block in template.generate(self._fields(conversation, for_answer=False)):
                blocks.append(block)
            text = "".join(blocks)
            text.encode()
        return text, marks

    def _template(self, conversation: Conversation) -> Template:
        return self._templates[conversation.tools is not None]

    def _fields(self, conversation: Conversation, for_answer: bool) -> dict[str, Any]:
        return {
            **self._special_tokens,
            **self._day,
            "messages": [_with_thinking(message) for message in conversation.messages],
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": for_answer,
        }


def load_chat_template(
    tokenizer: PreTrainedTokenizerBase, given: str | None = None, day: date | None = None
) -> ChatTemplate:
    """The chat template of a tokenizer, or one in its place."""
    own = given is None
    sources = _own_sources(tokenizer) if own else (given_source(tokenizer, given),) * 2
    return ChatTemplate(*sources, special_tokens=tokenizer.special_tokens_map, day=day)


def replace_chat_template(tokenizer: PreTrainedTokenizerBase, given: str | None) -> None:
    """Give a tokenizer another chat template, if there is one to give; see `load_chat_template`."""
    if given is not None:
        source = given_source(tokenizer, given)
        _compile(source)
        tokenizer.chat_template = source


def given_source(tokenizer: PreTrainedTokenizerBase, given: str) -> str:
    """The text of a template that is given in place of the tokenizer's."""
    if given != TRL:
        return template_text(given)
    return _training_source(tokenizer) or _own_sources(tokenizer)[0]


def template_text(given: str) -> str:
    """The text of a template that is given as such or as a file; `trl` as it is."""
    return given if given == TRL else read_template(given, "chat_template", (TRL,))


def _compile(source: str) -> Template:
    try:
        with template_errors():
            return chat_template_utils._compile_jinja_template(source)
    except TemplateError as error:
        raise DataError(f"the chat template is not valid Jinja: {error}; mend it") from error


def _own_sources(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The tokenizer's template, and the one that it has for conversations with tools."""
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer must have a chat template for messages, it has none; give one as "
            "chat_template, or write the conversations out as texts"
        )
    try:
        return tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])
    except ValueError as error:
        raise DataError(f"the tokenizer's chat template can't be told: {error}") from error


def _training_source(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What trl trains with in place of a tokenizer's template; None: the template itself."""
    _own_sources(tokenizer)
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError as error:
        raise DataError(
            f"chat_template {TRL} needs trl's templates: pip install trl ({error})"
        ) from error
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise DataError(
            f"trl has no training template for this tokenizer; give chat_template another one "
            f"({str(error).splitlines()[0]})"
        ) from error


def _with_thinking(message: Message) -> Message:
    """A message whose reasoning also has the name that gpt-oss's template knows it by."""
    if "reasoning_content" not in message:
        return message
    return {"thinking": message["reasoning_content"], **message}
