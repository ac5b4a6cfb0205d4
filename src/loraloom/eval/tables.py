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
from loraloom.eval.comparison import Comparison
from loraloom.eval.results import BASE, TaskScores, summarise

SUFFIXES = (".json", ".csv", ".md")
"""Of files of results; they say what is in them."""


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
    table = _table("adapter", right=[f"{task.task} ({task.split})" for task in tasks])
    for name in tasks[0].scores:
        table.add_row(name or BASE, *(_percent(accuracy(task.scores[name])) for task in tasks))
    return table


def group_table(task: TaskScores) -> Table | None:
    """Make a table with a row for each group of questions; None where they have no groups."""
    by_name = {name: accuracy_by_group(scores) for name, scores in task.scores.items()}
    groups = next(iter(by_name.values()))
    if not groups:
        return None
    table = _table(task.task, "questions", right=[name or BASE for name in by_name])
    for group, result in groups.items():
        cells = [_percent(by_group[group]) for by_group in by_name.values()]
        table.add_row(group, str(result.num_examples), *cells)
    return table


def comparison_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Make a table with a row for each comparison; None where there are none."""
    if not comparisons:
        return None
    titles = ("points", "95 % interval", "better : worse", "p", "p (Holm)")
    table = _table("difference", "task", right=titles)
    for one in comparisons:
        result = one.result
        low, high = result.interval
        table.add_row(
            f"{one.first} - {one.second}",
            one.task,
            f"{100 * result.difference:+.1f}{_spread(result.stderr)}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{result.num_first_better} : {result.num_second_better}",
            _p_value(result.p_value),
            _p_value(one.adjusted_p_value),
        )
    return table


def seeds_table(seeds: Mapping[str, Any], tasks: Sequence[str]) -> Table | None:
    """Make a table of means over seeds with a row for each group; None where there are no groups.

    Args:
        seeds: What `summarise_seeds` gives.
        tasks: Names of the columns.
    """
    if not seeds:
        return None
    table = _table("mean of seeds", "seeds", right=[f"{task} (± sd)" for task in tasks])
    for stem, group in seeds.items():
        cells = [
            f"{100 * group['tasks'][task]['mean']:.1f}{_spread(group['tasks'][task]['sd'])} %"
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
        comparison_table(comparisons),
        *(group_table(task) for task in tasks),
    ]
    return [table for table in tables if table is not None]


def markdown_page(tables: Sequence[Table], details: Mapping[str, Any]) -> str:
    """Write tables in Markdown, and below them how they were got.

    Args:
        tables: What `all_tables` gives.
        details: What `describe_evaluation` gives.
    """
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    scorings = ", ".join(
        f"{task} by {asked['scoring']} ({asked['num_questions']} questions)"
        for task, asked in details["tasks"].items()
    )
    below = (
        f"Accuracy ± standard error. Base model {details['base_model']} "
        f"({details['base_fingerprint']}) in {details['dtype']}, attention {details['attention']}, "
        f"on {details['device']}; {scorings}; {versions}; {details['date']}.\n\n"
        f"```sh\n{details['command']}\n```\n"
    )
    return "\n".join([*map(markdown, tables), below])


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    columns = [[_escape(str(cell)) for cell in column.cells] for column in table.columns]
    header = [_escape(str(column.header)) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [header, rules, *map(list, zip(*columns, strict=True))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def csv_page(tasks: Sequence[TaskScores]) -> str:
    """Write a line for each adapter and task, and for each group of questions if there are any."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    figures = ("accuracy", "stderr", "low", "high", "num_examples")
    writer.writerow(["adapter", "task", "split", "group", *figures])
    for adapter, by_task in summarise(tasks).items():
        for task, summary in by_task.items():
            for group, result in {"": summary, **summary.get("groups", {})}.items():
                row = [adapter, task, summary["split"], group]
                row += [result["accuracy"], result["stderr"], *result["interval"]]
                writer.writerow([*row, result["num_examples"]])
    return text.getvalue()


def _table(*left: str, right: Sequence[str]) -> Table:
    """A table without rules, with columns of text on the left and of numbers on the right."""
    table = Table(*left, box=None, padding=(0, 2, 0, 0))
    for title in right:
        table.add_column(title, justify="right")
    return table


def _percent(result: Accuracy) -> str:
    return f"{100 * result.accuracy:.1f}{_spread(result.stderr)} %"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.1f}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
