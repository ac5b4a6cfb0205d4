"""How an instruction becomes a prompt: the templates `alpaca` and `plain`, or a Jinja template.

A template is rendered with `instruction` and `input` (empty where a row has none) and with every
other field of the row. It ends where the answer begins. The sandbox, that of transformers, keeps
a template away from Python; it does not bound time or memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraloom.config.data import PROMPT_TEMPLATES
from loraloom.config.fields import suggestion
from loraloom.config.text import local_path, read_text
from loraloom.data.sources import Row
from loraloom.errors import DataError, shown

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_ENVIRONMENT.filters["regex_replace"] = lambda text, pattern, new="": re.sub(pattern, new, text)

_INSTRUCTION_COLUMNS = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "input": "context", "output": "response"},
)
"""Alpaca's and Dolly's names for the parts of an instruction row."""


def compile_template(source: str, origin: str) -> Template:
    """Compile a template; an unknown name in it is an error when it is filled in."""
    try:
        with template_errors():
            return _ENVIRONMENT.from_string(source)
    except TemplateError as error:
        raise DataError(f"{origin} is not valid Jinja: {error}; mend it") from error


def render(template: Template, fields: Mapping[str, Any]) -> str:
    """Fill in a template; whatever goes wrong is a TemplateError."""
    with template_errors():
        text = template.render(fields)
        text.encode()  # half of a surrogate pair, which no tokenizer reads, fails here
        return text


def fill_in(template: Template, row: Row, setting: str, more: Mapping[str, Any]) -> str:
    """Fill in a template with a row's fields and more; the row is at fault if that fails."""
    try:
        return render(template, {**row, **more})
    except TemplateError as error:
        fields = ", ".join(row) or "none"
        row.reject(f"{setting} can't be filled in: {error}; the row's fields are {fields}")


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn what fails inside into a TemplateError: a foreign program may raise anything."""
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateRuntimeError(str(error) or type(error).__name__) from error


def read_template(template: str, setting: str, names: Iterable[str]) -> str:
    """The text of a template that is given as such or as a file."""
    if "{{" in template or "{%" in template:
        return template
    try:
        return read_text(local_path(template, setting, DataError), DataError, 2**20)
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
    """Compile a prompt template; see `template_source`."""
    return compile_template(template_source(template), f"the prompt template {shown(template)}")


def read_instruction(row: Row, columns: dict[str, str], template: Template) -> tuple[str, str]:
    """Prompt and completion of an instruction row."""
    has_input = row.get(columns["input"]) is not None
    instruction, output = row.text(columns["instruction"]), row.answer(columns["output"])
    given = row.text(columns["input"]) if has_input else ""
    parts = {"instruction": instruction, "input": given}
    return fill_in(template, row, "the prompt template", parts), output


def instruction_columns(row: Row, mapping: dict[str, str] | None) -> dict[str, str]:
    """The row's names for instruction, input and output: the mapping, over Alpaca's or Dolly's."""
    merged = [{**columns, **(mapping or {})} for columns in _INSTRUCTION_COLUMNS]
    return next((columns for columns in merged if columns["output"] in row), merged[0])
