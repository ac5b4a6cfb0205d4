"""Which questions were answered right: what adapters are compared by.

From an evaluation that has just run, or from the files that `--per-question` wrote:

    >>> (task,) = read_answers("a.jsonl", "b.jsonl")
    >>> compare(task, "mix", "plain").p_value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraloom.data.files import read_file
from loraloom.data.rows import Row
from loraloom.errors import DataError
from loraloom.eval.results import BASE, TaskScores

_NO_FILTER = "none"
"""What lm-eval calls the filter that leaves answers as they are."""

_Answers = dict[int, tuple[str, bool]]
"""By a question's place: its hash, and whether it was answered right."""


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
    """The answers in files of `loraloom eval --per-question`, `--harness` or not, joined by task.

    Args:
        paths: At least one. Several may hold different adapters, or different tasks.

    Raises:
        DataError: If a file is missing or damaged, or its task has no right answers, if adapters of
            one task were asked different questions, or if two files have other answers of an
            adapter of the same name.
    """
    known_answers: dict[str, dict[str, _Answers]] = {}
    for path in paths:
        for task, adapter, answers in _read_file(Path(path)):
            known = known_answers.setdefault(task, {}).setdefault(adapter, answers)
            if known != answers:
                raise DataError(
                    f"{path}: {adapter!r} must have the answers to {task} that it has in the files "
                    "before, got others; give each adapter a name of its own"
                )
    return [_join(task, by_adapter) for task, by_adapter in known_answers.items()]


def _read_file(path: Path) -> Iterator[tuple[str, str, _Answers]]:
    answers: dict[tuple[str, str], _Answers] = {}
    for row in read_file(path):
        key = (_task_of(row), row.text("adapter"))
        index, correct = row.integer("index"), row.get("correct")
        if not isinstance(correct, bool):
            row.reject(f"field 'correct' must be true or false, got {correct!r}")
        if index in answers.setdefault(key, {}):
            row.reject(f"{key[1]!r} must answer question {index} of {key[0]} once, got it again")
        answers[key][index] = (row.text("question"), correct)
    for (task, adapter), by_index in answers.items():
        yield task, adapter, by_index


def _task_of(row: Row) -> str:
    """A task's name; answers that lm-eval filtered in several ways count as several tasks."""
    chosen_filter = row.get("filter", _NO_FILTER)
    return row.text("task") + ("" if chosen_filter == _NO_FILTER else f",{chosen_filter}")


def _join(task: str, by_adapter: Mapping[str, _Answers]) -> TaskAnswers:
    first, asked = next(iter(by_adapter.items()))
    questions = sorted(asked)
    for adapter, answers in by_adapter.items():
        others = [index for index in asked.keys() & answers if asked[index][0] != answers[index][0]]
        if others:
            raise DataError(
                f"{task}: adapters must have been asked the same questions, got another question "
                f"{min(others)} of {adapter!r} than of {first!r}; take files of the same split"
            )
        if sorted(answers) != questions:
            raise DataError(
                f"{task}: adapters must have been asked the same questions, got "
                f"{len(questions)} of {first!r} and {len(answers)} of {adapter!r}"
            )
    return TaskAnswers(
        task,
        tuple(questions),
        {
            adapter: tuple(answers[question][1] for question in questions)
            for adapter, answers in by_adapter.items()
        },
    )
