"""How an instruction becomes a prompt: the templates `alpaca` and `plain`, or a Jinja template.

A template is rendered with `instruction` and `input` (empty where a row has none) and with every
other field of the row. It ends where the answer begins.
"""

from __future__ import annotations

from jinja2 import StrictUndefined, Template, TemplateError

from loraloom.data.rows import Row
from loraloom.data.templates import BoundedEnvironment, compile_within, read_template, render
from loraloom.errors import DataError, shown

_ALPACA = """\
Below is an instruction that describes a task\
{% if input %}, paired with an input that provides further context{% endif %}. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

{% if input %}### Input:
{{ input }}

{% endif %}### Response:
"""

_PLAIN = """\
{{ instruction }}
{% if input %}{{ input }}
{% endif %}"""

TEMPLATES = {"alpaca": _ALPACA, "plain": _PLAIN}
"""Source of `alpaca`: Taori et al. 2023, Stanford Alpaca, `train.py`."""

INSTRUCTION_COLUMNS = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "input": "context", "output": "response"},
)
"""Alpaca's and Dolly's names for the parts of an instruction row."""


def load_template(template: str | None) -> Template:
    """A template by name, by its text or from a file; None is `alpaca`."""
    return compile_template(template_source(template), f"the prompt template {shown(template)}")


def compile_template(source: str, origin: str) -> Template:
    """A template from its text; an unknown name in it is an error when it is filled in."""
    environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return compile_within(environment, source)
    except TemplateError as error:
        raise DataError(f"{origin} is not valid Jinja: {error}") from error


def read_instruction(row: Row, columns: dict[str, str], template: Template) -> tuple[str, str]:
    """Prompt and completion of an instruction row."""
    has_input = row.get(columns["input"]) is not None
    instruction, output = row.text(columns["instruction"]), row.text(columns["output"])
    given = row.text(columns["input"]) if has_input else ""
    try:
        return render(template, {**row, "instruction": instruction, "input": given}), output
    except TemplateError as error:
        row.reject(f"the prompt template can't be filled in: {error}")


def instruction_columns(row: Row, mapping: dict[str, str] | None) -> dict[str, str]:
    """The row's names for instruction, input and output: the mapping, over Alpaca's or Dolly's."""
    given = mapping or {}
    for column in given.values():
        row[column]
    for columns in INSTRUCTION_COLUMNS:
        merged = {**columns, **given}
        if merged["output"] in row:
            return merged
    return {**INSTRUCTION_COLUMNS[0], **given}


def template_source(template: str | None) -> str:
    """The text of a template; see `load_template`."""
    name = template or "alpaca"
    return TEMPLATES.get(name) or read_template(name, "template", TEMPLATES)
