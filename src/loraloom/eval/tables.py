"""Results as tables on the terminal and in Markdown, and as a data frame.

Tables are made of results as they stand in the JSON file, by adapter and task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from loraloom.errors import ConfigError
from loraloom.eval.comparison import Comparison, Metric
from loraloom.terminal import make_table

if TYPE_CHECKING:
    from pandas import DataFrame

Result = Mapping[str, Any]
"""Of an adapter in a task, as in the JSON file."""

Results = Mapping[str, Mapping[str, Result]]
"""By adapter and task."""

SUFFIXES = (".json", ".csv", ".md")
"""Of files of results; they say what is in them."""

CONSTANT = "constant answer"
"""What tables call the answer that is the same to every question, the most frequent right one."""

_UNITS: Mapping[Metric, tuple[str, int, int]] = {
    "accuracy": ("points", 100, 1),
    "loss": ("nats a token", 1, 4),
}
"""Of what is compared: the unit of differences, how many of it make one, and decimals."""

_FIGURES = (
    "accuracy", "loss", "stderr", "low", "high", "perplexity", "num_examples", "num_tokens",
    "reward_accuracy", "reward_margin", "majority",
)  # fmt: skip
"""Columns of the data frame, those that there are."""

MARK = "†"
NOTE = f"{MARK} no better than a constant answer: always the most frequent right one"


def check_outputs(paths: Sequence[Path], per_question: Path | None = None) -> None:
    """Raise a ConfigError if a file's suffix says nothing, or two files are one."""
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"--output must be a file, got the directory {path}")
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--output must end in {', '.join(SUFFIXES)}, got {path}")
    files = [*paths, *([] if per_question is None else [per_question])]
    if len({path.resolve() for path in files}) < len(files):
        raise ConfigError(
            "--output and --per-question must name each file once, "
            f"got {', '.join(map(str, files))}"
        )


def evaluation_tables(
    results: Results, seeds: Mapping[str, Any], comparisons: Sequence[Comparison]
) -> list[Table]:
    """Make every table that there is something for, in the order to show them."""
    some = next(iter(results.values()))
    of_pairs = [task for task, result in some.items() if "reward_margin" in result]
    losses = [task for task, result in some.items() if "perplexity" in result]
    choices = [task for task in some if task not in (*of_pairs, *losses)]
    return [
        *([accuracy_table(results, choices)] if choices else []),
        *([_loss_table(results, losses)] if losses else []),
        *([_pairs_table(results, of_pairs)] if of_pairs else []),
        *([seeds_table(seeds, list(some), is_loss=not choices)] if seeds else []),
        *comparison_tables(comparisons),
        *(group_table(results, task) for task in choices if "groups" in some[task]),
    ]


def accuracy_table(results: Results, tasks: Sequence[str]) -> Table:
    """Make a table with a row for each adapter and a column for each task."""
    some = next(iter(results.values()))
    titles = [f"{task}\n({some[task]['split']})" for task in tasks]
    table = make_table("adapter", values=titles, title="Accuracy in %, with its 95 % interval")
    for adapter, by_task in results.items():
        table.add_row(adapter, *(_accuracy(by_task[task]) for task in tasks))
    table.add_row(CONSTANT, *(f"{100 * some[task]['majority']:.1f}" for task in tasks))
    return with_note(table)


def group_table(results: Results, task: str) -> Table:
    """Make a table with a row for each group of a task's questions."""
    groups = {adapter: by_task[task]["groups"] for adapter, by_task in results.items()}
    table = make_table(
        "group",
        values=["questions", CONSTANT, *groups],
        title=f"{task}: accuracy in % by group",
    )
    for group, result in next(iter(groups.values())).items():
        cells = [_accuracy(of_adapter[group]) for of_adapter in groups.values()]
        constant = f"{100 * result['majority']:.1f}"
        table.add_row(group, str(result["num_examples"]), constant, *cells)
    return with_note(table)


def _accuracy(result: Result) -> str:
    """An accuracy in percent with its interval, marked where a constant answer reaches it."""
    mark = "" if result["beats_majority"] else MARK
    return f"{_percent(result['accuracy'], result['interval'])}{mark}"


def _percent(share: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _loss_table(results: Results, tasks: Sequence[str]) -> Table:
    titles = [title for task in tasks for title in (f"{task}\nnats a token", f"{task}\nperplexity")]
    table = make_table("adapter", values=titles, title="Held-out loss, with its 95 % interval")
    for adapter, by_task in results.items():
        table.add_row(adapter, *(cell for task in tasks for cell in _loss_cells(by_task[task])))
    return table


def _loss_cells(result: Result) -> tuple[str, str]:
    low, high = result["interval"]
    value = result["perplexity"]
    try:
        shown = f"{value:.4g} ({math.exp(low):.4g}–{math.exp(high):.4g})"
    except (OverflowError, TypeError):  # it is no number any more
        shown = "-"
    return _decimals(result["loss"], result["interval"]), shown


def _decimals(value: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{value:.4f} ({low:.4f}–{high:.4f})"


def _pairs_table(results: Results, tasks: Sequence[str]) -> Table:
    figures = ("accuracy %", "reward accuracy %", "reward margin", "loss")
    titles = [f"{task}\n{figure}" for task in tasks for figure in figures]
    table = make_table("adapter", values=titles, title="Preference pairs, with 95 % intervals")
    for adapter, by_task in results.items():
        table.add_row(adapter, *(cell for task in tasks for cell in _pair_cells(by_task[task])))
    return table


def _pair_cells(result: Result) -> tuple[str, ...]:
    return (
        _percent(result["accuracy"], result["accuracy_interval"]),
        f"{100 * result['reward_accuracy']:.1f}",
        _decimals(result["reward_margin"], result["reward_margin_interval"]),
        _decimals(result["loss"], result["interval"]),
    )


def seeds_table(seeds: Mapping[str, Any], tasks: Sequence[str], *, is_loss: bool) -> Table:
    """Make a table of means over seeds with a row for each group."""
    what = "Mean loss of seeds" if is_loss else "Mean accuracy of seeds in %"
    scale, digits = (1, 4) if is_loss else (100, 1)
    table = make_table("adapters", values=["seeds", *tasks], title=f"{what} ± standard deviation")
    for stem, group in seeds.items():
        spreads = (group["tasks"][task] for task in tasks)
        cells = (
            f"{scale * one['mean']:.{digits}f} ± {scale * one['sd']:.{digits}f}" for one in spreads
        )
        table.add_row(stem, str(len(group["adapters"])), *cells)
    return table


def comparison_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """Make a table for each task with a row for each comparison."""
    by_task: dict[str, list[Comparison]] = {}
    for one in comparisons:
        by_task.setdefault(one.task, []).append(one)
    return [_comparison_table(task, own) for task, own in by_task.items()]


def _comparison_table(task: str, comparisons: Sequence[Comparison]) -> Table:
    metric = comparisons[0].metric
    unit, scale, digits = _UNITS[metric]
    table = make_table(
        "difference",
        values=(unit, "95 % interval", "won : lost", "p", "p (Holm)"),
        title=f"{task}: differences in {metric}",
    )
    for one in comparisons:
        result = one.result
        low, high = result.interval
        table.add_row(
            f"{one.first} - {one.second}",
            f"{scale * result.difference:+.{digits}f}",
            f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}",
            f"{result.num_first_better} : {result.num_second_better}",
            _p_value(result.p_value),
            _p_value(one.adjusted_p_value),
        )
    return table


def markdown_page(tables: Sequence[Table], details: Mapping[str, Any]) -> str:
    """Write tables in Markdown, and below them how they were got."""
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    asked = "; ".join(f"{task} {_asked(how)}" for task, how in details["tasks"].items())
    below = (
        f"Base model {details['base_model']} "
        f"({details['base_fingerprint']}) in {details['dtype']}, attention {details['attention']}, "
        f"on {details['device']}; {asked}; {versions}; {details['date']}.\n\n"
        f"```sh\n{details['command']}\n```\n"
    )
    return "\n".join([*map(markdown, tables), below])


def _asked(how: Mapping[str, Any]) -> str:
    if "scoring" in how:
        return f"by {how['scoring']} ({how['num_questions']} questions)"
    return f"as {how['format']} ({how['num_examples']} rows, {how['num_tokens']} tokens)"


def markdown(table: Table) -> str:
    """Write a table in Markdown, with its title above and its caption below."""
    columns = [[_escape(str(cell)) for cell in column.cells] for column in table.columns]
    header = [_escape(str(column.header)) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [header, rules, *map(list, zip(*columns, strict=True))]
    above = "" if table.title is None else f"{table.title}:\n\n"
    below = "" if table.caption is None else f"\n{table.caption}\n"
    return above + "".join(f"| {' | '.join(row)} |\n" for row in rows) + below


def data_frame(results: Results) -> DataFrame:
    """Lay results out in rows: an adapter, a task, a group of questions, and the figures."""
    from pandas import DataFrame

    rows = []
    for adapter, by_task in results.items():
        for task, result in by_task.items():
            for group, one in [("", result), *result.get("groups", {}).items()]:
                low, high = one["interval"]
                names = {"adapter": adapter, "task": task, "split": result["split"], "group": group}
                rows.append({**names, **one, "low": low, "high": high})
    columns = ["adapter", "task", "split", "group", *_FIGURES]
    return DataFrame(rows, dtype=object).filter(items=columns)


def with_note(table: Table) -> Table:
    """Explain the mark below a table that has it."""
    cells = (str(cell) for column in table.columns for cell in column.cells)
    if any(MARK in cell for cell in cells):
        table.caption = NOTE
    return table


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
