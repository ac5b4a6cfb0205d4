"""Results as tables on the terminal and in Markdown, and as a data frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from loraloom.errors import ConfigError
from loraloom.terminal import make_table

if TYPE_CHECKING:
    from pandas import DataFrame

    from loraloom.eval.results import Comparison, Evaluation, TaskResult

    Results = Mapping[str, Mapping[str, TaskResult]]

SUFFIXES = (".json", ".csv", ".md")

# What tables call the answer that is the same to every question, the most frequent right one.
CONSTANT = "constant answer"
MARK = "†"
NOTE = f"{MARK} no better than a constant answer: always the most frequent right one"

# Of what is compared: the unit of differences, how many of it make one, and decimals.
_UNITS = {"accuracy": ("points", 100, 1), "loss": ("nats a token", 1, 4)}

# Of the data frame, those that there are.
_COLUMNS = (
    "adapter", "task", "split", "group", "accuracy", "loss", "stderr", "low", "high", "perplexity",
    "num_examples", "num_tokens", "reward_accuracy", "reward_margin", "majority",
)  # fmt: skip


def check_outputs(paths: Sequence[Path], per_question: Path | None = None) -> None:
    """Raise a ConfigError if a file's suffix says nothing, or two files are one."""
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"--output must be a file, got the directory {path}")
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--output must end in {', '.join(SUFFIXES)}, got {path}")
    files = [*paths, *([] if per_question is None else [per_question])]
    if len({path.resolve() for path in files}) < len(files):
        names = ", ".join(map(str, files))
        raise ConfigError(f"--output and --per-question must name each file once, got {names}")


def evaluation_tables(found: Evaluation) -> list[Table]:
    """Make every table that there is something for, in the order to show them."""
    results, some = found.results, next(iter(found.results.values()))
    of_pairs = [task for task, result in some.items() if "reward_margin" in result]
    losses = [task for task, result in some.items() if "perplexity" in result]
    choices = [task for task in some if task not in (*of_pairs, *losses)]
    tables = []
    if choices:
        title = "Accuracy in %, with its 95 % interval"
        titles = [f"{task}\n({some[task].get('split')})" for task in choices]
        table = _by_adapter(title, results, choices, titles, lambda one: [accuracy_cell(one)])
        table.add_row(CONSTANT, *(_percent(some[task].get("majority")) for task in choices))
        tables.append(with_note(table))
    if losses:
        title = "Held-out loss, with its 95 % interval"
        titles = [f"{task}\n{what}" for task in losses for what in ("nats a token", "perplexity")]
        tables.append(_by_adapter(title, results, losses, titles, _loss_cells))
    if of_pairs:
        figures = ("accuracy %", "reward accuracy %", "reward margin", "loss")
        titles = [f"{task}\n{figure}" for task in of_pairs for figure in figures]
        title = "Preference pairs, with 95 % intervals"
        tables.append(_by_adapter(title, results, of_pairs, titles, _pair_cells))
    if found.seeds:
        tables.append(_seeds_table(found, list(some), is_loss=not choices))
    for task, comparisons in groupby(found.comparisons, lambda one: one.task):
        tables.append(_comparison_table(task, list(comparisons)))
    return tables + [_group_table(results, task) for task in choices if "groups" in some[task]]


def _by_adapter(
    title: str,
    results: Results,
    tasks: Sequence[str],
    titles: Sequence[str],
    cells: Callable[[Any], Sequence[str]],
) -> Table:
    """Make a table with a row for each adapter and some columns for each task."""
    table = make_table("adapter", values=titles, title=title)
    for adapter, by_task in results.items():
        table.add_row(adapter, *(cell for task in tasks for cell in cells(by_task[task])))
    return table


def _group_table(results: Results, task: str) -> Table:
    groups: Any = {adapter: by_task[task].get("groups") for adapter, by_task in results.items()}
    columns = ["questions", CONSTANT, *groups]
    table = make_table("group", values=columns, title=f"{task}: accuracy in % by group")
    for group, result in next(iter(groups.values())).items():
        cells = [accuracy_cell(of_adapter[group]) for of_adapter in groups.values()]
        table.add_row(group, str(result["num_examples"]), _percent(result["majority"]), *cells)
    return with_note(table)


def accuracy_cell(result: Any) -> str:
    """An accuracy in percent with its interval, marked where a constant answer reaches it."""
    mark = MARK if result.get("beats_majority") is False else ""  # files of old don't have it
    return f"{_percent(result.get('accuracy'), result.get('interval', ()))}{mark}"


def _percent(share: Any, interval: Sequence[float] = ()) -> str:
    text = "–" if share is None else f"{100 * share:.1f}"
    return f"{text} ({'–'.join(map(_percent, interval))})" if interval else text


def _decimals(value: float, interval: Sequence[float]) -> str:
    return f"{value:.4f} ({'–'.join(f'{end:.4f}' for end in interval)})"


def _loss_cells(result: Any) -> Sequence[str]:
    low, high = result["interval"]
    try:
        perplexity = f"{result['perplexity']:.4g} ({math.exp(low):.4g}–{math.exp(high):.4g})"
    except (OverflowError, TypeError):  # it is no number any more
        perplexity = "-"
    return _decimals(result["loss"], result["interval"]), perplexity


def _pair_cells(result: Any) -> Sequence[str]:
    return (
        _percent(result["accuracy"], result["accuracy_interval"]),
        _percent(result["reward_accuracy"]),
        _decimals(result["reward_margin"], result["reward_margin_interval"]),
        _decimals(result["loss"], result["interval"]),
    )


def _seeds_table(found: Evaluation, tasks: Sequence[str], *, is_loss: bool) -> Table:
    what = "Mean loss of seeds" if is_loss else "Mean accuracy of seeds in %"
    scale, digits = (1, 4) if is_loss else (100, 1)
    table = make_table("adapters", values=["seeds", *tasks], title=f"{what} ± standard deviation")
    for stem, group in found.seeds.items():
        spreads: Any = [group["tasks"][task] for task in tasks]
        pairs = [(scale * one["mean"], scale * one["sd"]) for one in spreads]
        cells = (f"{mean:.{digits}f} ± {sd:.{digits}f}" for mean, sd in pairs)
        table.add_row(stem, str(len(group["adapters"])), *cells)
    return table


def _comparison_table(task: str, comparisons: Sequence[Comparison]) -> Table:
    unit, scale, digits = _UNITS[comparisons[0].metric]
    titles = (unit, "95 % interval", "won : lost", "p", "p (Holm)")
    title = f"{task}: differences in {comparisons[0].metric}"
    table = make_table("difference", values=titles, title=title)
    for one in comparisons:
        ends = (one.difference, *one.interval)
        difference, low, high = (f"{scale * end:+.{digits}f}" for end in ends)
        p_values = (one.p_value, one.adjusted_p_value)
        table.add_row(
            f"{one.first} - {one.second}",
            difference,
            f"{low} to {high}",
            f"{one.num_first_better} : {one.num_second_better}",
            *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in p_values),
        )
    return table


def with_note(table: Table) -> Table:
    cells = (str(cell) for column in table.columns for cell in column.cells)
    if any(MARK in cell for cell in cells):
        table.caption = NOTE
    return table


def markdown_page(found: Evaluation) -> str:
    """Write an evaluation's tables in Markdown, and below them how they were got."""
    asked = "; ".join(
        f"{task} by {one['scoring']} ({one['num_questions']} questions)"
        if "scoring" in one
        else f"{task} as {one['format']} ({one['num_examples']} rows, {one['num_tokens']} tokens)"
        for task, one in found.tasks.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    below = (
        f"Base model {found.base_model} ({found.base_fingerprint}) in {found.dtype}, attention "
        f"{found.attention}, on {found.device}; {asked}; {versions}; {found.date}.\n\n"
        f"```sh\n{found.command}\n```\n"
    )
    return "\n".join([*map(markdown, found.tables()), below])


def markdown(table: Table) -> str:
    """Write a table in Markdown, with its title above and its caption below."""
    columns = [
        [
            str(cell).replace("|", "\\|").replace("\n", " ")
            for cell in (column.header, *column.cells)
        ]
        for column in table.columns
    ]
    header, *rows = map(list, zip(*columns, strict=True))
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    above = "" if table.title is None else f"{table.title}:\n\n"
    below = "" if table.caption is None else f"\n{table.caption}\n"
    lines = [f"| {' | '.join(row)} |\n" for row in (header, rules, *rows)]
    return above + "".join(lines) + below


def data_frame(results: Results) -> DataFrame:
    """Lay results out in rows: an adapter, a task, a group of questions, and the figures."""
    from pandas import DataFrame

    rows = []
    for adapter, by_task in results.items():
        for task, result in by_task.items():
            for group, one in [("", result), *result.get("groups", {}).items()]:
                low, high = one.get("interval", (None, None))
                names = {"adapter": adapter, "task": task, "split": result.get("split")}
                rows.append({**names, "group": group, **one, "low": low, "high": high})
    return DataFrame(rows, dtype=object).filter(items=list(_COLUMNS))
