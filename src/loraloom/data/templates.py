"""Jinja from files and models, in the sandbox that transformers, vLLM and trl run templates in.

The sandbox keeps a template away from Python. It does not bound time or memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loraloom.config.faults import suggestion
from loraloom.config.json_text import read_text
from loraloom.config.paths import local_path
from loraloom.errors import DataError

MAX_TEMPLATE_BYTES = 2**20

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_ENVIRONMENT.filters["regex_replace"] = lambda text, pattern, new="": re.sub(pattern, new, text)


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
        return read_text(local_path(template, setting, DataError), DataError, MAX_TEMPLATE_BYTES)
    except DataError as error:
        raise DataError(
            f"{suggestion(template, names)}{setting} must be {', '.join(names)}, a Jinja template "
            f"or a file with one: {error}"
        ) from None
