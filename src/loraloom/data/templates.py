"""Jinja from files and models, in a sandbox where it can neither hang nor fill the memory.

Jinja's sandbox keeps a template away from Python. Here every loop, call, operator and filter that
could go on or grow draws on a budget besides, and what goes wrong is one kind of error.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

from jinja2 import Template, TemplateError, TemplateRuntimeError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler
from jinja2.visitor import NodeTransformer

from loraloom.config.faults import suggestion
from loraloom.config.json_text import read_text
from loraloom.config.paths import local_path
from loraloom.errors import DataError

MAX_TEMPLATE_BYTES = 2**20
MAX_SECONDS = 5.0
MAX_CHARACTERS = 100_000_000
_MAX_INTEGER_BITS = 10_000
_OBJECT_SIZE = 50
"""Characters that an entry of a list counts for, about what its bytes are."""
_TOO_LONG = "it makes a text, a list or a number that is too long"

_GROWING = frozenset(
    "batch center expandtabs indent join ljust replace rjust slice tojson translate wordwrap"
    " xmlattr zfill".split()
)
"""Filters and methods whose result may be as long as the product of what they take."""

_WIDE_FIELDS = {
    "%": re.compile(r"%(\([^()]*\(|(\([^()]*\))?[-+ #\d.]*(\*|\d{5}))"),
    "format": re.compile(r"\{[^{}]*(\{|\[[^\]]*[{}]|:[^{}]*\d{5})"),
}
"""Widths that are given elsewhere or have five digits, in a text to format, by who formats it; and
keys with parentheses or braces, behind which one could hide."""


class _Budget:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + MAX_SECONDS
        self.characters = MAX_CHARACTERS

    def spend(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise TemplateRuntimeError(f"it makes more than {MAX_CHARACTERS} characters")
        if time.monotonic() > self.deadline:
            raise TemplateRuntimeError(f"it takes more than {MAX_SECONDS:g} seconds")


_BUDGET: ContextVar[_Budget] = ContextVar("budget of a template")


def _spend(characters: int) -> None:
    _BUDGET.get().spend(characters)


@contextmanager
def bounded() -> Iterator[None]:
    """Give what runs inside a budget of its own; whatever fails there is a TemplateError."""
    token = _BUDGET.set(_Budget())
    try:
        yield
    except TemplateError:
        raise
    except Exception as error:  # a foreign program, in effect: 1/0, recursion, wrong types
        raise TemplateRuntimeError(str(error) or type(error).__name__) from error
    finally:
        _BUDGET.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, whose templates must be compiled and rendered under `bounded`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any):
        super().__init__(**settings, finalize=_count_output)
        del self.globals["lipsum"]  # makes as much text as it is asked for
        self.filters = {name: counted(name, taken) for name, taken in self.filters.items()}
        self.filters |= {"_steps": _steps, "_joined": _joined, "_copied": _copied}
        self.filters["_measured"] = _measured

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _BUDGETED.visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` if the result is of a reasonable size."""
        if operator == "%" and isinstance(left, str):
            _check_format("%", left)
        elif operator != "+":
            _check_product(operator, left, right)
        return _measured(_copied(super().call_binop(context, operator, left, right)))

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, within the budget."""
        method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
        name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        _check_call(name, (owner, *args, *kwargs.values()))
        result = super().call(context, called, *args, **kwargs)
        _spend(_written_size(result))
        return result


class _Budgeting(NodeTransformer):
    """Puts what the environment can't intercept through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802, jinja2's name
        """Count steps, each with the text that stands in the loop."""
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = _filter(node.iter, "_steps", nodes.Const(text))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802, jinja2's name
        """Count what `~` joins."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "_joined")

    def visit_List(self, node: nodes.Literal) -> nodes.Expr:  # noqa: N802, jinja2's name
        """Measure what a template puts together.

        Entries may be shared, so that a few lines make a list of lists that takes years to compare
        or to write. Data of files shares nothing, and filters and calls count what they return.
        """
        self.generic_visit(node)
        return _filter(node, "_measured")

    visit_Dict = visit_List  # noqa: N815, jinja2's name

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802, jinja2's name
        """Measure a tuple, unless it is what values are taken apart to."""
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Name(self, node: nodes.Name) -> nodes.Expr:  # noqa: N802, jinja2's name
        """Measure the tuple of a macro's further arguments, which nobody has written down."""
        is_collected = node.ctx == "load" and node.name in ("varargs", "kwargs")
        return _filter(node, "_measured") if is_collected else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802, jinja2's name
        """Count copies of a part of a text or list."""
        self.generic_visit(node)
        is_slice = isinstance(node.arg, nodes.Slice)
        return _filter(node, "_copied") if is_slice else node


_BUDGETED = _Budgeting()


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(
        cast("nodes.Expr", node), name, list(args), [], None, None, lineno=node.lineno or 1
    )


def counted(name: str, taken: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that draws on the budget."""

    @wraps(taken)
    def within_budget(*args: Any, **kwargs: Any) -> Any:
        _check_call("%" if name == "format" else name, (*args, *kwargs.values()))
        result = taken(*args, **kwargs)
        _spend(_written_size(result))
        return result

    return within_budget


def _steps(values: Iterable[Any], characters: int) -> Iterator[Any]:
    for value in values:
        _spend(characters)
        yield value


def _joined(values: list[Any]) -> str:
    _spend(sum(map(_written_size, values)))
    return "".join(map(str, values))


def _copied(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _spend(len(value))
    return value


def _measured(value: Any) -> Any:
    _spend(0)
    if _written_size(value) > MAX_CHARACTERS:
        raise TemplateRuntimeError(_TOO_LONG)
    return value


def _count_output(value: Any) -> Any:
    _spend(_written_size(value))
    return value


def _check_call(name: str, values: tuple[Any, ...]) -> None:
    _spend(0)
    if name in _GROWING:
        _check_product("*", *values)
    elif name in ("%", "format", "format_map"):
        _check_format(name.removesuffix("_map"), str(values[0]))


def _check_format(how: str, text: str) -> None:
    if _WIDE_FIELDS[how].search(text):
        raise TemplateRuntimeError("a width to format must be a number of up to four digits")


def _check_product(operator: str, *values: Any) -> None:
    """Refuse what makes a text, a list or a number too long."""
    if all(isinstance(value, int | float) for value in values):
        bits = [int(value).bit_length() for value in values if isinstance(value, int)]
        size = bits[0] * abs(int(values[1])) if operator == "**" and bits else sum(bits)
        limit = _MAX_INTEGER_BITS
    else:
        size, limit = 1, MAX_CHARACTERS
        for value in values:
            size *= max(abs(value) if isinstance(value, int) else _written_size(value), 1)
    if size > limit:
        raise TemplateRuntimeError(_TOO_LONG)


def _written_size(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters that a value is written with."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Cycler):  # its items can be had as a tuple
        value = value.items
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return 1
    known = {} if known is None else known
    if id(value) not in known:
        entries = [*value, *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = sum(_OBJECT_SIZE + _written_size(entry, known) for entry in entries)
    return known[id(value)]


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


def compile_within(environment: BoundedEnvironment, source: str) -> Template:
    """A template from its text."""
    with bounded():
        return environment.from_string(source)


def render(template: Template, fields: Mapping[str, Any]) -> str:
    """A template filled in."""
    with bounded():
        return check_text("".join(_blocks(template, fields)))


def _blocks(template: Template, fields: Mapping[str, Any]) -> Iterator[str]:
    for block in template.generate(fields):
        _spend(len(block))
        yield block


def check_text(text: str) -> str:
    """A rendered text as it came, if a tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateRuntimeError(f"it makes no text of Unicode: {error}") from None
    return text
