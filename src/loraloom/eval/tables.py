"""Results as tables: on the terminal, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loraloom.errors import ConfigError
from loraloom.eval.accuracy import Accuracy, accuracy, accuracy_by_group
from loraloom.eval.comparison import Comparison, Metric
from loraloom.eval.results import BASE, TaskScores, summarise
from loraloom.eval.statistics import wilson_interval
from loraloom.terminal import make_table

SUFFIXES = (".json", ".csv", ".md")
"""Of files of results; they say what is in them."""

CONSTANT = "constant answer"
"""What tables call the answer that is the same to every question, the most frequent right one."""

_UNITS: Mapping[Metric, tuple[str, int, int]] = {
    "accuracy": ("points", 100, 1),
    "loss": ("nats a token", 1, 4),
}
"""Of what is compared: the unit of differences, how many of it make one, and decimals."""

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


def results_table(tasks: Sequence[TaskScores]) -> Table:
    """Make a table with a row for each adapter and a column for each task."""
    titles = [f"{task.task}\n({task.split})" for task in tasks]
    table = make_table("adapter", values=titles, title="Accuracy in %, with its 95 % interval")
    results = {name: [accuracy(task.scores[name]) for task in tasks] for name in tasks[0].scores}
    for name, row in results.items():
        table.add_row(name or BASE, *map(format_accuracy, row))
    first = next(iter(results.values()))
    table.add_row(CONSTANT, *(f"{100 * result.majority:.1f}" for result in first))
    return with_note(table)


def group_table(task: TaskScores) -> Table | None:
    """Make a table with a row for each group of questions; None where they have no groups."""
    by_name = {name: accuracy_by_group(scores) for name, scores in task.scores.items()}
    groups = next(iter(by_name.values()))
    if not groups:
        return None
    table = make_table(
        "group",
        values=["questions", CONSTANT, *(name or BASE for name in by_name)],
        title=f"{task.task}: accuracy in % by group",
    )
    for group, result in groups.items():
        cells = [format_accuracy(by_group[group]) for by_group in by_name.values()]
        constant = f"{100 * result.majority:.1f}"
        table.add_row(group, str(result.num_examples), constant, *cells)
    return with_note(table)


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


def seeds_table(seeds: Mapping[str, Any], tasks: Sequence[str]) -> Table | None:
    """Make a table of means over seeds with a row for each group, if there are groups."""
    if not seeds:
        return None
    table = make_table(
        "adapters",
        values=["seeds", *tasks],
        title="Mean accuracy of seeds in % ± standard deviation",
    )
    for stem, group in seeds.items():
        cells = [
            f"{100 * group['tasks'][task]['mean']:.1f} ± {100 * group['tasks'][task]['sd']:.1f}"
            for task in tasks
        ]
        table.add_row(stem, str(len(group["adapters"])), *cells)
    return table


def all_tables(
    tasks: Sequence[TaskScores], seeds: Mapping[str, Any], comparisons: Sequence[Comparison]
) -> list[Table]:
    """Make every table that there is something for, in the order to show them."""
    tables = [
        results_table(tasks),
        seeds_table(seeds, [task.task for task in tasks]),
        *comparison_tables(comparisons),
        *(group_table(task) for task in tasks),
    ]
    return [table for table in tables if table is not None]


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


def csv_page(tasks: Sequence[TaskScores]) -> str:
    """Write a line for each adapter and task, and for each group of questions if there are any."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    figures = ("accuracy", "stderr", "low", "high", "num_examples", "majority")
    writer.writerow(["adapter", "task", "split", "group", *figures])
    for adapter, by_task in summarise(tasks).items():
        for task, summary in by_task.items():
            for group, result in [("", summary), *summary.get("groups", {}).items()]:
                row = [adapter, task, summary["split"], group]
                row += [result["accuracy"], result["stderr"], *result["interval"]]
                writer.writerow([*row, result["num_examples"], result["majority"]])
    return text.getvalue()


def format_accuracy(result: Accuracy) -> str:
    """An accuracy in percent with its interval, marked where a constant answer reaches it."""
    low, high = wilson_interval(result.accuracy, result.num_examples)
    mark = "" if result.beats_majority else MARK
    return f"{100 * result.accuracy:.1f} ({100 * low:.1f}–{100 * high:.1f}){mark}"


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
