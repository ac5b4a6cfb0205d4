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

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from loraloom.errors import plain

_FILE_WIDTH = 10_000
PLAIN_INTERVAL_S = 10.0  # between two lines of progress in a file


def make_console(*, stderr: bool = False, **options: Any) -> Console:
    """Make a console that prints texts as they are, and breaks no line of a file or a pipe."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False, **options)
    if "width" not in options and not console.is_terminal and not console.is_jupyter:
        console.width = _FILE_WIDTH
    return console


def make_table(*keys: str, values: Sequence[str | Text] = (), title: str | None = None) -> Table:
    """Make a table without rules; keys are on the left, values on the right."""
    columns = [*keys, *(Column(value, justify="right") for value in values)]
    return Table(*columns, title=title, box=None, padding=(0, 2, 0, 0))


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
    """Print tables with an empty line between two; cells that don't fit are folded."""
    for number, table in enumerate(tables):
        if number:
            console.print()
        if table.title is not None:
            console.print(_as_text(table.title))
        console.print(_with_texts(table))
        if table.caption is not None:
            console.print(_as_text(table.caption))


def _with_texts(table: Table) -> Table:
    """Make a copy whose cells are texts."""
    copy = Table(box=None, padding=table.padding, show_header=table.show_header)
    for column in table.columns:
        copy.add_column(_as_text(column.header), justify=column.justify, overflow="fold")
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        copy.add_row(*map(_as_text, cells))
    return copy


def _as_text(cell: object) -> Text:
    """A text as it is, whatever console it is printed on, with controls escaped."""
    return Text(plain(str(cell)))
