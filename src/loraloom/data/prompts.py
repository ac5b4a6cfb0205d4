"""How an instruction becomes a prompt: the templates `alpaca` and `plain`, or a Jinja template.

A template is rendered with `instruction` and `input` (empty where a row has none) and with every
other field of the row. It ends where the answer begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from jinja2 import Template, TemplateError
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PROMPT_TEMPLATES, DataConfig, PromptForm, SourceConfig
from loraloom.data.chat_template import ChatTemplate, given_source
from loraloom.data.locations import find_location, read_rows, stream_rows
from loraloom.data.messages import Message, read_conversation, read_messages
from loraloom.data.rows import Row
from loraloom.data.templates import compile_template, read_template, render
from loraloom.errors import DataError, shown

INSTRUCTION_COLUMNS = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "input": "context", "output": "response"},
)
"""Alpaca's and Dolly's names for the parts of an instruction row."""


def load_template(template: str | None) -> Template:
    """A template by name, by its text or from a file; None is `alpaca`."""
    return compile_template(template_source(template), f"the prompt template {shown(template)}")


def read_instruction(row: Row, columns: dict[str, str], template: Template) -> tuple[str, str]:
    """Prompt and completion of an instruction row."""
    has_input = row.get(columns["input"]) is not None
    instruction, output = row.text(columns["instruction"]), row.answer(columns["output"])
    given = row.text(columns["input"]) if has_input else ""
    try:
        return render(template, {**row, "instruction": instruction, "input": given}), output
    except TemplateError as error:
        row.reject(
            f"the prompt template can't be filled in: {error}; the row's fields are "
            f"{', '.join(row)}"
        )


def instruction_columns(row: Row, mapping: dict[str, str] | None) -> dict[str, str]:
    """The row's names for instruction, input and output: the mapping, over Alpaca's or Dolly's."""
    given = mapping or {}
    for columns in INSTRUCTION_COLUMNS:
        merged = {**columns, **given}
        if merged["output"] in row:
            return merged
    return {**INSTRUCTION_COLUMNS[0], **given}


def template_source(template: str | None) -> str:
    """The text of a template; see `load_template`."""
    name = template or "alpaca"
    return PROMPT_TEMPLATES.get(name) or read_template(name, "template", PROMPT_TEMPLATES)


def given_form(
    tokenizer: PreTrainedTokenizerBase, template: str | None, chat_template: str | None
) -> PromptForm | None:
    """The form that a prompt template or a chat template asks for; None without either."""
    if template is not None:
        return PromptForm(format="instruction", template=template_source(template))
    if chat_template is None:
        return None
    source = given_source(tokenizer, chat_template)
    ChatTemplate(source, source, {})  # an error now if it is no template
    return PromptForm(format="chat", chat_template=source)


def prompt_form(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """How a job's data writes prompts; of a mix, how its first source does.

    The system message is kept where the first rows (100) all have the same one.
    """
    source = data.sources[0]
    match source.format:
        case None:
            return PromptForm(format="task")
        case "text":
            return PromptForm(format="text")
        case "instruction":
            name = source.template or "alpaca"
            template = name if name in PROMPT_TEMPLATES else template_source(name)
            return PromptForm(format="instruction", template=template)
    beginnings = [*_beginnings(source, streaming=data.streaming)]
    if None in beginnings:
        return PromptForm(format="preference")
    template = source.chat_template and given_source(tokenizer, source.chat_template)
    systems = {one["content"] if one and one["role"] == "system" else None for one in beginnings}
    system = systems.pop() if len(systems) == 1 else None
    return PromptForm(format="chat", chat_template=template, system=system)


def _beginnings(source: SourceConfig, *, streaming: bool) -> Iterator[Message | None]:
    """The first message of each of the first rows; None of a preference between texts."""
    assert source.dataset is not None, "tasks have no format"
    location = (source.dataset, source.split or "train", source.config)
    is_file = isinstance(find_location(*location), Path)
    rows = stream_rows(*location).rows() if streaming or is_file else iter(read_rows(*location))
    columns = source.fields or {}
    for row in islice(rows, 100):
        names = [columns.get(role, role) for role in ("prompt", "chosen")]
        messages = next((name for name in names if isinstance(row.get(name), list)), None)
        try:
            if source.format == "chat":
                first = read_conversation(row, columns).messages[0]
            else:
                first = None if messages is None else read_messages(row, messages)[0]
        except DataError:  # it is skipped, or encoding will report it
            continue
        yield first
