"""What people read on a terminal or in a pipe: text as it is, and tables that fit.

Names, templates and texts of others may hold what rich takes for markup (`[/INST]`) or for an emoji
(`:tada:`), so every console is made here, where both are off.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from time import monotonic
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from loraloom.errors import plain

# Characters between two columns.
_PADDING = 2
# Between two lines of progress in a file.
PLAIN_INTERVAL_S = 10.0


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
        has_estimate = task.time_remaining is not None
        remaining = f", ETA {timedelta(seconds=task.time_remaining or 0)}" if has_estimate else ""
        console.print(f"{name}: {task.percentage:.0f} %{remaining}")

    with bars:
        yield advance


def printed(text: str) -> str:
    # what a model says may hold escapes that would steer the terminal; spaces and joiners stay
    joiners = "\t\u200c\u200d"
    return "".join(c if c in joiners or unicodedata.category(c) == "Zs" else plain(c) for c in text)


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print tables with an empty line between two, each in parts that fit."""
    for number, table in enumerate(tables):
        lines = [line for piece in fitted(table, console.width) for line in ("", piece)][1:]
        above = [] if table.title is None else [_as_text(table.title)]
        below = [] if table.caption is None else [_as_text(table.caption)]
        console.print(*([""] if number else []), *above, *lines, *below, sep="\n")


def fitted(table: Table, width: int) -> Iterator[Table]:
    """Divide a table's columns so that each part fits; one that fits stays whole."""
    # The keys, on the left up to the first column of numbers, are in every part.
    is_number = [column.justify == "right" for column in table.columns]
    num_keys = max(is_number.index(True), 1) if any(is_number) else len(is_number)
    keys, values = table.columns[:num_keys], table.columns[num_keys:]
    widths = [min(_width(key, of_words=True), width // 2 // num_keys) for key in keys]
    groups: list[list[Column]] = [[]]
    for column in values:
        if groups[-1] and sum(map(_width, [*groups[-1], column])) > width - sum(widths):
            groups.append([])
        groups[-1].append(column)
    for group in groups:
        piece = Table(box=table.box, padding=table.padding, show_header=table.show_header)
        columns = [*keys, *group]
        min_widths = [*widths, *map(_width, group)]
        for index, (column, min_width) in enumerate(zip(columns, min_widths, strict=True)):
            piece.add_column(
                _as_text(column.header),
                justify=column.justify,
                no_wrap=index >= num_keys,
                overflow="fold",
                min_width=min_width - _PADDING,
            )
        cells = (column.cells for column in columns)
        for row, *texts in zip(table.rows, *cells, strict=True):
            piece.add_row(*map(_as_text, texts), style=row.style)
        yield piece


def _as_text(cell: object) -> Text:
    """A text as it is, whatever console it is printed on, with controls escaped."""
    return Text(plain(str(cell)))


def _width(column: Column, *, of_words: bool = False) -> int:
    """Characters of the longest line or word, and the padding after it."""
    separator = None if of_words else "\n"
    cells = (plain(str(text)).split(separator) for text in (column.header, *column.cells))
    return max(map(cell_len, chain.from_iterable(cells)), default=0) + _PADDING
