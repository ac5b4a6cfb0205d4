"""Which questions were answered right: what adapters are compared by.

From an evaluation that has just run, or from the files that `--per-question` wrote:

    >>> (task,) = read_answers("a.jsonl", "b.jsonl")
    >>> compare(task, "mixlora", "lora").p_value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraloom.data.files import read_file
from loraloom.errors import DataError
from loraloom.eval.results import BASE, TaskScores


@dataclass(frozen=True)
class TaskAnswers:
    """Whether each question of a task was answered right.

    Args:
        task: Name of the task.
        questions: Their places in the split.
        right: By adapter, in the order of the questions; `base` is the base model.
    """

    task: str
    questions: tuple[int, ...]
    right: Mapping[str, tuple[bool, ...]]


def answers_of(task: TaskScores) -> TaskAnswers:
    """The answers of an evaluation."""
    first = next(iter(task.scores.values()))
    return TaskAnswers(
        task.task,
        tuple(score.question.index for score in first),
        {
            name or BASE: tuple(score.correct for score in scores)
            for name, scores in task.scores.items()
        },
    )


def read_answers(*paths: str | Path) -> list[TaskAnswers]:
    """The answers in files of `loraloom eval --per-question`, joined by task.

    Args:
        paths: At least one. Several may hold different adapters, or different tasks.

    Raises:
        DataError: If a file is missing or damaged, if adapters of one task were asked different
            questions, or if two files have other answers of an adapter of the same name.
    """
    right: dict[str, dict[str, dict[int, bool]]] = {}
    for path in paths:
        for task, adapter, answers in _read_file(Path(path)):
            known = right.setdefault(task, {}).setdefault(adapter, answers)
            if known != answers:
                raise DataError(
                    f"{path}: {adapter!r} must have the answers to {task} that it has in the files "
                    "before, got others; give each adapter a name of its own"
                )
    return [_join(task, by_adapter) for task, by_adapter in right.items()]


def _read_file(path: Path) -> Iterator[tuple[str, str, dict[int, bool]]]:
    answers: dict[tuple[str, str], dict[int, bool]] = {}
    for row in read_file(path):
        key = (row.text("task"), row.text("adapter"))
        index = row.integer("index")
        if index in answers.setdefault(key, {}):
            row.reject(f"{key[1]!r} must answer question {index} of {key[0]} once, got it again")
        answers[key][index] = row["chosen"] == row.text("correct_label")
    for (task, adapter), by_index in answers.items():
        yield task, adapter, by_index


def _join(task: str, by_adapter: Mapping[str, Mapping[int, bool]]) -> TaskAnswers:
    questions = sorted(next(iter(by_adapter.values())))
    for adapter, answers in by_adapter.items():
        if sorted(answers) != questions:
            raise DataError(
                f"{task}: adapters must have been asked the same questions, got "
                f"{len(questions)} of {next(iter(by_adapter))!r} and {len(answers)} of {adapter!r}"
            )
    return TaskAnswers(
        task,
        tuple(questions),
        {
            adapter: tuple(answers[question] for question in questions)
            for adapter, answers in by_adapter.items()
        },
    )
