"""Results as tables and files: on the terminal, in JSON, in Markdown and in CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loraloom.durable import write_output
from loraloom.errors import ConfigError
from loraloom.eval.comparison import Comparison
from loraloom.eval.results import (
    TaskScores,
    group_table,
    results_table,
    summarise,
    write_results,
)

SUFFIXES = (".json", ".csv", ".md")
"""Of files of results; they say what is in them."""

_CSV_COLUMNS = ("accuracy", "stderr", "low", "high", "num_examples")


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


def write_outputs(
    paths: Sequence[Path],
    tasks: Sequence[TaskScores],
    seeds: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    beside: Mapping[str, Any],
) -> None:
    """Write results to each file in the form of its suffix.

    Args:
        paths: Checked by `check_outputs`.
        tasks: What was scored.
        seeds: What `summarise_seeds` gives.
        comparisons: What `compare_all` gives.
        beside: What `describe_evaluation` gives.

    Raises:
        ConfigError: If a file can't be written.
    """
    for path in paths:
        match path.suffix.lower():
            case ".csv":
                write_csv(path, tasks)
            case ".md":
                write_markdown(path, all_tables(tasks, seeds, comparisons), beside)
            case _:
                compared = [one.to_json() for one in comparisons]
                write_results(path, tasks, {"seeds": seeds, "comparisons": compared, **beside})


def comparison_table(comparisons: Sequence[Comparison]) -> Table | None:
    """Make a table with a row for each comparison; None where there are none."""
    if not comparisons:
        return None
    table = Table("difference", "task", box=None, padding=(0, 2, 0, 0))
    for title in ("points", "95 % interval", "better : worse", "p", "p (Holm)"):
        table.add_column(title, justify="right")
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
    table = Table("mean of seeds", "seeds", box=None, padding=(0, 2, 0, 0))
    for task in tasks:
        table.add_column(f"{task} (± sd)", justify="right")
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


def write_markdown(path: Path, tables: Sequence[Table], beside: Mapping[str, Any]) -> None:
    """Write tables in Markdown, and below them how they were got.

    Args:
        path: The file.
        tables: What `all_tables` gives.
        beside: What `describe_evaluation` gives.

    Raises:
        ConfigError: If the file can't be written.
    """
    versions = ", ".join(f"{name} {version}" for name, version in beside["versions"].items())
    scorings = ", ".join(
        f"{task} by {asked['scoring']} ({asked['num_questions']} questions)"
        for task, asked in beside["tasks"].items()
    )
    below = (
        f"Accuracy ± standard error. Base model {beside['base_model']} "
        f"({beside['base_fingerprint']}) in {beside['dtype']}, attention {beside['attention']}, on "
        f"{beside['device']}; {scorings}; {versions}; {beside['date']}.\n\n"
        f"```sh\n{beside['command']}\n```\n"
    )
    write_output(path, "\n".join([*map(markdown, tables), below]))


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    columns = [[_escape(str(cell)) for cell in column.cells] for column in table.columns]
    header = [_escape(str(column.header)) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = [header, rules, *map(list, zip(*columns, strict=True))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_csv(path: Path, tasks: Sequence[TaskScores]) -> None:
    """Write a line for each adapter and task, and for each group of questions where there are some.

    Raises:
        ConfigError: If the file can't be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["adapter", "task", "split", "group", *_CSV_COLUMNS])
    for adapter, by_task in summarise(tasks).items():
        for task, summary in by_task.items():
            for group, result in {"": summary, **summary.get("groups", {})}.items():
                writer.writerow([adapter, task, summary["split"], group, *_figures(result)])
    write_output(path, text.getvalue())


def _figures(result: Mapping[str, Any]) -> list[Any]:
    low, high = result["interval"]
    return [result["accuracy"], result["stderr"], low, high, result["num_examples"]]


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {100 * value:.1f}"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
