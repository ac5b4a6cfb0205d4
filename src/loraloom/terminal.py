"""What people read on a terminal or in a pipe: text as it is, and tables that fit.

Names, templates and texts of others may hold what rich takes for markup (`[/INST]`) or for an emoji
(`:tada:`), so every console is made here, where both are off.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from tqdm.auto import tqdm

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
    interval_s = 0.1 if is_live else PLAIN_INTERVAL_S
    form = "{desc}: {percentage:.0f} % |{bar}|"
    bar: Any = tqdm(
        total=sum(sizes),
        file=console and console.file,
        disable=console is None or console.quiet,
        leave=False,
        delay=interval_s,
        mininterval=interval_s,
        smoothing=0,
        desc=name,
        bar_format=form,
    )

    def advance(places: Sequence[int]) -> None:
        is_first = not (bar.disable or bar.n)
        bar.update(sum(sizes[place] for place in places))
        if is_first:  # The first items take longest; time left is estimated by those after them.
            bar.unpause()
            bar.initial = bar.n
            bar.start_t = bar.last_print_t
            bar.bar_format = f"{form} ETA {{remaining}}"

    with bar:
        yield advance


def printed(text: str) -> str:
    # what a model says may hold escapes that would steer the terminal; spaces and joiners stay
    joiners = "\t\u200c\u200d"
    return "".join(c if c in joiners or unicodedata.category(c) == "Zs" else plain(c) for c in text)


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    """Print tables with an empty line between two, each in parts that fit."""
    for number, table in enumerate(tables):
        lines = [line for part in fitted(table, console.width) for line in ("", part)][1:]
        above, below = (
            [] if text is None else [_as_text(text)] for text in (table.title, table.caption)
        )
        console.print(*([""] if number else []), *above, *lines, *below, sep="\n")


def fitted(table: Table, width: int) -> Iterator[Table]:
    """Divide a table's columns so that each part fits; one that fits stays whole."""
    # The keys, on the left up to the first column of numbers, are in every part.
    is_number = [column.justify == "right" for column in table.columns]
    num_keys = max(is_number.index(True), 1) if any(is_number) else len(is_number)
    keys, values = table.columns[:num_keys], table.columns[num_keys:]
    widths = [min(_width(key, of_words=True), width // 2 // num_keys) for key in keys]
    parts: list[list[Column]] = [[]]
    for column in values:
        if parts[-1] and sum(map(_width, [*parts[-1], column])) > width - sum(widths):
            parts.append([])
        parts[-1].append(column)
    for columns in parts:
        part = Table(box=table.box, padding=table.padding, show_header=table.show_header)
        for column, least in zip([*keys, *columns], [*widths, *map(_width, columns)], strict=True):
            part.add_column(
                _as_text(column.header),
                justify=column.justify,
                no_wrap=any(column is one for one in columns),
                overflow="fold",
                min_width=least - _PADDING,
            )
        cells = (column.cells for column in [*keys, *columns])
        for row, *texts in zip(table.rows, *cells, strict=True):
            part.add_row(*map(_as_text, texts), style=row.style)
        yield part


def _as_text(cell: object) -> Text:
    """A text as it is, whatever console it is printed on, with controls escaped."""
    return Text(plain(str(cell)))


def _width(column: Column, *, of_words: bool = False) -> int:
    """Characters of the longest line or word, and the padding after it."""
    texts = [plain(str(text)) for text in (column.header, *column.cells)]
    parts = [part for text in texts for part in (text.split() if of_words else text.split("\n"))]
    return max(map(cell_len, parts), default=0) + _PADDING
