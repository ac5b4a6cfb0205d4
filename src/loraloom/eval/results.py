"""What an evaluation leaves: accuracies by adapter and task, and a line for each question."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraloom.data.questions import questions_digest
from loraloom.durable import write_output
from loraloom.errors import not_finite
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
                place = f"in {task.task}, question {score.question.index}"
                raise not_finite("scores", score.log_likelihoods, [name], place)


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
    return {
        **asdict(result),
        "beats_majority": result.beats_majority,
        "interval": list(wilson_interval(result.accuracy, result.num_examples)),
    }


def write_questions(path: Path, tasks: Sequence[TaskScores]) -> None:
    """Write a JSON line for each task, adapter and question."""
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
