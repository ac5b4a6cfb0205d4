"""What people read on a terminal or in a pipe: text as it stands, and tables that fit.

Names, templates and texts of others may hold what rich takes for markup (`[/INST]`) or for an emoji
(`:tada:`), so every console is made here, where both are off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from loraloom.errors import plain

_PADDING = 2
"""Characters between two columns."""


def make_console(*, stderr: bool = False, **options: Any) -> Console:
    """Make a console that prints texts as they are."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, **options)


def make_table(*keys: str, values: Sequence[str | Text] = (), title: str | None = None) -> Table:
    """Make a table without rules."""
    table = Table(*keys, title=title, box=None, padding=(0, _PADDING, 0, 0))
    for value in values:
        table.add_column(value, justify="right")
    return table


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print tables with an empty line between two, each with its title and its caption.

    One that is too wide is printed in parts, each with the keys and some of the other columns.
    """
    for number, table in enumerate(tables):
        parts = list(fitted(table, console.width))
        above = [] if table.title is None else [_as_text(table.title)]
        below = [] if table.caption is None else [_as_text(table.caption)]
        lines = [line for part in parts for line in ("", part)][1:]
        console.print(*([""] if number else []), *above, *lines, *below, sep="\n")


def fitted(table: Table, width: int) -> Iterator[Table]:
    """Divide a table's columns so that each part fits; one that fits stays whole.

    The keys are the columns on the left up to the first of numbers; all, if none has numbers. They
    stand in every part, and are folded where nothing else helps.
    """
    num_keys = _count_keys(table.columns)
    keys, values = table.columns[:num_keys], table.columns[num_keys:]
    most = width // 2 // num_keys
    widths = [min(_least_width(key), most) for key in keys]
    part: list[Column] = []
    for column in values:
        if part and sum(map(_width, [*part, column])) > width - sum(widths):
            yield _part(table, [*keys, *part], widths)
            part = []
        part.append(column)
    yield _part(table, [*keys, *part], widths)


def _count_keys(columns: Sequence[Column]) -> int:
    numbers = [place for place, column in enumerate(columns) if column.justify == "right"]
    return max(numbers[0], 1) if numbers else len(columns)


def _part(table: Table, columns: Sequence[Column], key_widths: Sequence[int]) -> Table:
    part = Table(box=table.box, padding=table.padding, show_header=table.show_header)
    for place, column in enumerate(columns):
        is_key = place < len(key_widths)
        part.add_column(
            _as_text(column.header),
            justify=column.justify,
            overflow="fold",
            no_wrap=not is_key,
            min_width=(key_widths[place] if is_key else _width(column)) - _PADDING,
        )
    cells = [list(column.cells) for column in columns]
    for row, texts in zip(table.rows, zip(*cells, strict=True), strict=True):
        part.add_row(*map(_as_text, texts), style=row.style)
    return part


def _as_text(cell: object) -> Text:
    """A text as it stands, whatever console it is printed on, with controls escaped."""
    return Text(plain(str(cell)))


def _texts(column: Column) -> list[str]:
    return [plain(str(text)) for text in (column.header, *column.cells)]


def _width(column: Column) -> int:
    """Characters of the longest line, and the padding after it."""
    lines = [line for text in _texts(column) for line in text.split("\n")]
    return max(map(cell_len, lines)) + _PADDING


def _least_width(column: Column) -> int:
    """Characters of the longest word, and the padding after it."""
    words = [word for text in _texts(column) for word in text.split()]
    return max(map(cell_len, words), default=0) + _PADDING
