"""Jinja templates: how an instruction becomes a prompt, and a conversation a text.

A prompt template is rendered with `instruction`, `input` (perhaps empty) and the row's other
fields. transformers' sandbox keeps it away from Python; it does not bound time or memory.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from loraloom.config.data import PROMPT_TEMPLATES, TOOL_TEMPLATE
from loraloom.config.fields import suggestion
from loraloom.config.text import local_path, read_text
from loraloom.data.sources import Row, fields_of
from loraloom.errors import DataError, shown

# Today, for templates in training, as in Llama 3.2's by default: the same rows are the same tokens
# tomorrow, and the same ones are held out.
TRAINING_DAY = date(2024, 7, 26)
# In place of a template: the one for base models of ChatML's turns whose template leaves tools out.
HERMES = "hermes"
_CHATML = ("<|im_start|>", "<|im_end|>")
# A text, and where in it the answers begin and end, in characters.
Marked = tuple[str, list[tuple[int, int]]]
# `role` and `content`; `tool_calls` and `reasoning_content` where an assistant's turn has them.
Message = dict[str, Any]
_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_RENDERING = threading.Lock()  # in transformers 5.18, two threads' renders disturb each other
_ENVIRONMENT.filters["regex_replace"] = lambda text, pattern, new="": re.sub(pattern, new, text)


class Conversation(NamedTuple):
    """Messages, and the tools that they may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    num_prompt_messages: int = 0  # which are read, and not learned
    variables: Mapping[str, Any] | None = None  # of the chat template

    def until(self, index: int) -> Conversation:
        return self._replace(messages=self.messages[:index])

    def changed(self, index: int, **fields: object) -> Conversation:
        messages = [*self.messages]
        messages[index] = {**messages[index], **fields}
        return self._replace(messages=messages)


@lru_cache(maxsize=256)
def compile_template(source: str, origin: str, read: Any = _ENVIRONMENT.from_string) -> Template:
    try:
        with template_errors():
            return read(source)
    except TemplateError as error:
        raise DataError(f"{origin} is not valid Jinja: {error}; correct the template") from error


def render(template: Template, fields: Mapping[str, Any]) -> str:
    with template_errors():
        text = template.render(fields)
        # half of a surrogate pair, which no tokenizer reads, fails here
        text.encode()
        return text


def fill_in(template: Template, row: Row, setting: str, more: Mapping[str, Any]) -> str:
    """Fill in a template with a row's fields and more; the row is at fault if that fails."""
    try:
        return render(template, {**row, **more})
    except TemplateError as error:
        kind = f"{setting} can't be filled in: {error}"
        row.reject(f"{kind}; the row's fields are {fields_of(row)}", kind)


@contextmanager
def template_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateRuntimeError(str(error) or type(error).__name__) from error


def read_template(template: str, setting: str, names: Iterable[str]) -> str:
    if "{{" in template or "{%" in template:
        return template
    try:
        if (text := read_text(local_path(template, setting, DataError), DataError)).strip():
            return text
        raise DataError(f"{template} is empty")
    except DataError as error:
        raise DataError(
            f"{suggestion(template, names)}{setting} must be {', '.join(names)}, a Jinja template "
            f"or a file with one: {error}"
        ) from None


def template_source(template: str | None) -> str:
    """The text of a prompt template by name, by its text or from a file; None is `alpaca`."""
    name = template or "alpaca"
    return PROMPT_TEMPLATES.get(name) or read_template(name, "template", PROMPT_TEMPLATES)


def load_template(template: str | None) -> Template:
    return compile_template(template_source(template), f"the prompt template {shown(template)}")


def read_instruction(row: Row, columns: dict[str, str], template: Template) -> tuple[str, str]:
    instruction, output = row.text(columns["instruction"]), row.answer(columns["output"])
    parts = {"instruction": instruction, "input": read_input(row, columns)}
    return fill_in(template, row, "the prompt template", parts), output


def read_input(row: Row, columns: dict[str, str]) -> str:
    name = columns.get("input")
    return "" if name is None or row.get(name) is None else row.text(name)


def with_variables(source: str, variables: Mapping[str, Any]) -> str:
    """Set variables at the beginning of a chat template."""
    settings = ""
    for name, value in variables.items():
        if name.isidentifier():  # or no template can read it
            settings += f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}"
    # chat templates are compiled with trim_blocks, which drops this line break
    return f"{settings}\n{source}"


class ChatTemplate:
    """A tokenizer's chat template, or a text in its place, as `apply_chat_template` renders it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: str | None = None, day: date | None = None
    ):
        self.tokenizer, self._given = tokenizer, source
        self._fields: dict[str, Any] = {**tokenizer.special_tokens_map}
        # apply_chat_template takes plain data alone, and so no other clock
        if day is not None:
            self._fields["strftime_now"] = day.strftime
        self._compile(None)

    def source(self, tools: list[dict[str, Any]] | None = None) -> str:
        try:
            return self.tokenizer.get_chat_template(self._given, tools)
        except ValueError as error:
            raise DataError(
                "the tokenizer must have a chat template for messages, and a default if there are "
                "several; set chat_template, or write the conversations as text"
            ) from error

    def render(self, conversation: Conversation, *, for_answer: bool = False) -> str:
        """The text of a conversation; `for_answer` ends it where the model's answer begins."""
        return self.render_with_marks(conversation, for_answer=for_answer)[0]

    def render_with_marks(self, conversation: Conversation, *, for_answer: bool = False) -> Marked:
        template, tools = self._compile(conversation.tools), conversation.tools
        fields = {**self._fields, **(conversation.variables or {})}
        messages = [
            # gpt-oss's template calls the reasoning `thinking`
            {"thinking": message["reasoning_content"], **message}
            if "reasoning_content" in message
            else message
            for message in conversation.messages
        ]
        with _RENDERING, template_errors():
            text, marks = chat_template_utils._render_with_assistant_indices(
                template, messages, tools, None, for_answer, **fields
            )
            # half of a surrogate pair, which no tokenizer reads, fails here
            text.encode()
            return text, marks

    def closing(self) -> str:
        """The end-of-text token, if the template puts it after a conversation that only asks."""
        end = str(self._fields.get("eos_token", ""))
        try:
            question = self.render(Conversation([{"role": "user", "content": "?"}]))
        except TemplateError:
            return ""
        return end if question.endswith(end) else ""

    def turn_end(self) -> str:
        """The token that the template puts behind an answer, if it is none that ends texts."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        try:
            behind = self.render(Conversation(turns)).rpartition("!")[2].lstrip()
        except TemplateError:
            return ""
        added = self.tokenizer.added_tokens_decoder.values()
        ends = [str(token) for token in added if token.special and behind.startswith(str(token))]
        end = max(ends, key=len, default="")
        return "" if end == self.tokenizer.eos_token else end

    def _compile(self, tools: list[dict[str, Any]] | None) -> Template:
        read = chat_template_utils._compile_jinja_template
        return compile_template(self.source(tools), "the chat template", read)


def accepts_hermes(tokenizer: PreTrainedTokenizerBase) -> bool:
    # a copy of the vocabulary takes milliseconds, and each faulty row asks
    missing = (None, tokenizer.unk_token_id)
    return all(tokenizer.convert_tokens_to_ids(token) not in missing for token in _CHATML)


def given_source(
    tokenizer: PreTrainedTokenizerBase, template: str, setting: str = "chat_template"
) -> str:
    if template == HERMES:
        if not accepts_hermes(tokenizer):
            raise DataError(
                f"the template {HERMES} requires a tokenizer with the tokens "
                f"{' and '.join(_CHATML)}; write a template with the base model's own turns"
            )
        return TOOL_TEMPLATE
    return read_template(template, setting, (HERMES,))
