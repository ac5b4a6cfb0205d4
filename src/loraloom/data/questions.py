"""The questions of a choice task, to be scored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraloom.config.data import Scoring, is_task_file
from loraloom.data.examples import ChoiceQuestion
from loraloom.data.locations import HubSource
from loraloom.data.tasks import find_task


@dataclass(frozen=True)
class QuestionSet:
    """Questions of a task's split, and where they came from.

    `source` is a record for results: the file with its SHA-256, the hub's copy, or that loraloom
    made them.
    """

    task: str
    split: str
    scoring: Scoring
    questions: list[ChoiceQuestion]
    source: dict[str, Any]


def load_question_set(
    task: str,
    scoring: Scoring | None = None,
    split: str | None = None,
    path: str | Path | None = None,
    limit: int | None = None,
) -> QuestionSet:
    """The questions of a task's split, in the order of its rows."""
    found = find_task(task)
    split, scoring = split or found.evaluation_split, scoring or found.scoring
    rows = found.load_rows(split, path)
    source = _describe(found.find_data(split, path))
    if is_task_file(task):
        source |= {"task_file": task, "task_file_sha256": sha256(Path(task))}
    questions = [found.question(row, index, scoring) for index, row in enumerate(rows[:limit])]
    return QuestionSet(found.name, split, scoring, questions, source)


def questions_digest(questions: list[ChoiceQuestion]) -> str:
    """Hash what is asked, in its order, with SHA-256: prompts, answers, labels, normalizers."""
    text = json.dumps([asdict(question) for question in questions], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hash a file, as `sha256sum` does."""
    with path.expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(data: Any) -> dict[str, Any]:
    if isinstance(data, Path):
        return {"file": str(data), "sha256": sha256(data)}
    if isinstance(data, HubSource):
        return {"hub": data.repository, "config": data.config, "revision": data.revision}
    return {"generated": "by loraloom"}
