"""What an evaluation leaves: a JSON file, a line for each question, and tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from loraloom.data.questions import questions_digest
from loraloom.durable import write_output
from loraloom.errors import AdapterError
from loraloom.eval.accuracy import Accuracy, QuestionScore, accuracy, accuracy_by_group
from loraloom.eval.statistics import wilson_interval

BASE = "base"
"""What results call the base model."""

SCHEMA_VERSION = 1
"""Of the JSON file. A field that goes or changes its meaning raises it, a new one does not."""


@dataclass(frozen=True)
class TaskScores:
    """One task's scores, by adapter; None is the base model."""

    task: str
    split: str
    scores: Mapping[str | None, Sequence[QuestionScore]]


def check_finite(task: TaskScores) -> None:
    """Raise an AdapterError if an adapter, or the base model, has a score that is not finite."""
    for name, scores in task.scores.items():
        for score in scores:
            if not score.finite:
                who = "the base model" if name is None else f"adapter {name!r}"
                raise AdapterError(
                    f"scores must be finite, got {score.log_likelihoods} from {who} in "
                    f"{task.task}, question {score.question.index}; the weights have diverged, or "
                    "float16 is too narrow for them (take bfloat16)"
                )


def summarise(tasks: Sequence[TaskScores]) -> dict[str, dict[str, Any]]:
    """Give accuracies by adapter and task, as they stand in the JSON file under `results`."""
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for name, scores in task.scores.items():
            results.setdefault(name or BASE, {})[task.task] = _summary(task, scores)
    return results


def _summary(task: TaskScores, scores: Sequence[QuestionScore]) -> dict[str, Any]:
    summary: dict[str, Any] = {**_as_json(accuracy(scores)), "split": task.split}
    num_truncated = sum(score.truncated for score in scores)
    if num_truncated:
        summary["num_truncated"] = num_truncated
    groups = accuracy_by_group(scores)
    if groups:
        summary["groups"] = {group: _as_json(result) for group, result in groups.items()}
    return summary


def _as_json(result: Accuracy) -> dict[str, Any]:
    interval = wilson_interval(result.accuracy, result.num_examples)
    return {**asdict(result), "interval": list(interval)}


def write_results(path: Path, tasks: Sequence[TaskScores], beside: Mapping[str, Any]) -> None:
    """Write `{"schema_version": 1, "results": {adapter: {task: {accuracy, ...}}}, ...}`.

    Args:
        path: The JSON file.
        tasks: What was scored.
        beside: What stands beside `results`: comparisons, seeds, and how they were got.

    Raises:
        ConfigError: If the file can't be written.
    """
    value = {"schema_version": SCHEMA_VERSION, "results": summarise(tasks), **beside}
    write_output(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_questions(path: Path, tasks: Sequence[TaskScores]) -> None:
    """Write a JSON line for each task, adapter and question.

    Raises:
        ConfigError: If the file can't be written.
    """
    lines = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in _lines(tasks))
    write_output(path, "".join(f"{line}\n" for line in lines))


def _lines(tasks: Sequence[TaskScores]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        for name, scores in task.scores.items():
            for score in scores:
                question, chosen = score.question, score.chosen
                yield {
                    "task": task.task,
                    "split": task.split,
                    "index": question.index,
                    "question": questions_digest([question])[:16],
                    "adapter": name or BASE,
                    "correct": score.correct,
                    "chosen": None if chosen is None else question.labels[chosen],
                    "correct_label": question.labels[question.gold],
                    "scores": list(score.scores),
                }


def results_table(tasks: Sequence[TaskScores]) -> Table:
    """Make a table with a row for each adapter and a column for each task."""
    table = Table("adapter", box=None, padding=(0, 2, 0, 0))
    for task in tasks:
        table.add_column(f"{task.task} ({task.split})", justify="right")
    for name in tasks[0].scores:
        cells = [_cell(accuracy(task.scores[name])) for task in tasks]
        table.add_row(name or BASE, *cells)
    return table


def group_table(task: TaskScores) -> Table | None:
    """Make a table with a row for each group of questions; None where they have no groups."""
    by_name = {name: accuracy_by_group(scores) for name, scores in task.scores.items()}
    groups = next(iter(by_name.values()))
    if not groups:
        return None
    table = Table(task.task, "questions", box=None, padding=(0, 2, 0, 0))
    for name in by_name:
        table.add_column(name or BASE, justify="right")
    for group, result in groups.items():
        cells = [_cell(by_group[group]) for by_group in by_name.values()]
        table.add_row(group, str(result.num_examples), *cells)
    return table


def _cell(result: Accuracy) -> str:
    spread = "" if result.stderr is None else f" ± {100 * result.stderr:.1f}"
    return f"{100 * result.accuracy:.1f}{spread} %"
