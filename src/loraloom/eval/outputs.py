"""The files that an evaluation writes; a file's suffix says what is in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError
from loraloom.eval.comparison import Comparison
from loraloom.eval.results import TaskScores, write_results
from loraloom.eval.tables import all_tables, write_csv, write_markdown

SUFFIXES = (".json", ".csv", ".md")


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
