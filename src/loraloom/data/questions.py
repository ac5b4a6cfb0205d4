"""The questions of a choice task, to be scored."""

from __future__ import annotations

from pathlib import Path

from loraloom.config.data import Scoring
from loraloom.data.examples import ChoiceQuestion
from loraloom.data.tasks import find_task


def load_questions(
    task: str,
    scoring: Scoring,
    split: str | None = None,
    path: str | Path | None = None,
    limit: int | None = None,
) -> list[ChoiceQuestion]:
    """The questions of a task's split, in the order of its rows.

    Args:
        task: Name of the task.
        scoring: `label` asks for the choice's label, `text` for its own text.
        split: None for the split that is reported: test for ARC and OpenBookQA, else validation.
        path: Local copy: the data set's directory, a directory of data sets, or a file; None for
            the hub.
        limit: Most questions to take from the beginning.

    Raises:
        ConfigError: If the task is unknown.
        DataError: If its data is missing, empty, damaged or has no published answers.
    """
    found = find_task(task)
    rows = found.load_rows(split or found.evaluation_split, path)
    return [found.question(row, index, scoring) for index, row in enumerate(rows[:limit])]
