"""What people read on a terminal or in a pipe: text as it is, and tables that fit.

Names, templates and texts of others may hold what rich takes for markup (`[/INST]`) or for an emoji
(`:tada:`), so every console is made here, where both are off.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from loraloom.errors import plain

_PADDING = 2  # characters between two columns
PLAIN_INTERVAL_S = 10.0  # between two lines of progress in a file


def make_console(*, stderr: bool = False, **options: Any) -> Console:
    """Make a console that prints texts as they are."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, **options)


def make_table(*keys: str, values: Sequence[str | Text] = (), title: str | None = None) -> Table:
    """Make a table without rules; keys are on the left, values on the right."""
    columns = [*keys, *(Column(value, justify="right") for value in values)]
    return Table(*columns, title=title, box=None, padding=(0, _PADDING, 0, 0))


def notebook_console() -> Console | None:
    """Make a console in a notebook, where progress is shown unasked; None elsewhere."""
    console = make_console(stderr=True)
    return console if console.is_jupyter else None


@contextmanager
def show_progress(
    console: Console | None, name: str, sizes: Sequence[int]
) -> Iterator[Callable[[Sequence[int]], None]]:
    """Show the share of items done, by the sizes that are given when done, and the time left."""
    console = console or notebook_console()
    is_live = console is not None and (console.is_terminal or console.is_jupyter)
    bars = Progress(
        TextColumn("{task.description}: {task.percentage:.0f} %", markup=False),
        BarColumn(),
        "ETA",
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_live,
        get_time=monotonic,
        speed_estimate_period=math.inf,
    )
    # the first items take longest: rich estimates the time left by those after them
    bars.add_task(name, total=sum(sizes))
    task = bars.tasks[0]
    due_at = monotonic() + PLAIN_INTERVAL_S

    def advance(indices: Sequence[int]) -> None:
        nonlocal due_at
        bars.update(task.id, advance=sum(sizes[index] for index in indices))
        if console is None or is_live or monotonic() < due_at:
            return
        due_at = monotonic() + PLAIN_INTERVAL_S
        line = f"{name}: {task.percentage:.0f} %"
        if task.time_remaining is not None:
            line += f", ETA {timedelta(seconds=task.time_remaining)}"
        console.print(line)

    with bars:
        yield advance


def show_bytes(num_bytes: int) -> str:
    for unit, size in {"GB": 1e9, "MB": 1e6}.items():
        if num_bytes >= size:
            return f"{num_bytes / size:,.2f} {unit}"
    return f"{num_bytes / 1e3:.2f} kB"


def printed(text: str) -> str:
    # what a model says may hold escapes that would steer the terminal; spaces and joiners stay
    escaped = ""
    for character in text:
        is_space = character == "\t" or unicodedata.category(character) == "Zs"
        is_joiner = character in "\u200c\u200d"
        escaped += character if is_space or is_joiner else plain(character)
    return escaped


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print tables with an empty line between two, each in parts that fit."""
    for number, table in enumerate(tables):
        if number:
            console.print()
        if table.title is not None:
            console.print(_as_text(table.title))
        for index, piece in enumerate(_divide(table, console.width)):
            if index:
                console.print()
            console.print(piece)
        if table.caption is not None:
            console.print(_as_text(table.caption))


def _divide(table: Table, width: int) -> Iterator[Table]:
    """Divide a table's columns so that each part fits; one that fits stays whole."""
    # the keys, on the left up to the first column of numbers, are in every part
    is_number = [column.justify == "right" for column in table.columns]
    num_keys = max(is_number.index(True), 1) if any(is_number) else len(is_number)
    keys = range(num_keys)
    widths = [_width(column, of_words=index in keys) for index, column in enumerate(table.columns)]
    for key in keys:
        widths[key] = min(widths[key], width // 2 // num_keys)
    groups: list[list[int]] = [[]]
    for index in range(num_keys, len(widths)):
        columns = [*keys, *groups[-1], index]
        if groups[-1] and sum(widths[column] for column in columns) > width:
            groups.append([])
        groups[-1].append(index)
    for group in groups:
        piece = Table(box=None, padding=table.padding, show_header=table.show_header)
        columns = [*keys, *group]
        for index in columns:
            piece.add_column(
                _as_text(table.columns[index].header),
                justify=table.columns[index].justify,
                no_wrap=index not in keys,
                overflow="fold",
                min_width=widths[index] - _PADDING,
            )
        cells = [table.columns[index].cells for index in columns]
        for row, *texts in zip(table.rows, *cells, strict=True):
            piece.add_row(*map(_as_text, texts), style=row.style)
        yield piece


def _as_text(cell: object) -> Text:
    """A text as it is, whatever console it is printed on, with controls escaped."""
    return Text(plain(str(cell)))


def _width(column: Column, *, of_words: bool) -> int:
    separator = None if of_words else "\n"
    longest = 0
    for text in (column.header, *column.cells):
        words = plain(str(text)).split(separator)
        longest = max(longest, *map(cell_len, words), 0)
    return longest + _PADDING
