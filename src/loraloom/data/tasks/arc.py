"""ARC: science questions of school exams, an easy and a hard set.

Labels are A to E in most rows and 1 to 4 in some; each question keeps its own.
"""

from __future__ import annotations

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import (
    ChoiceForm,
    ChoiceTask,
    choose_label,
    choose_text_per_character,
)

_REVISION = "210d026faf9955653af8916fad021475a3f00453"


def read_choices(row: Row) -> tuple[list[str], list[str], int]:
    """Answers, labels and the index of the right one, from fields `choices` and `answerKey`.

    Raises:
        DataError: If a field is missing or `answerKey` is none of the labels.
    """
    choices = row.part("choices")
    answers, labels = choices.texts("text"), choices.texts("label")
    if len(answers) != len(labels) or not labels:
        choices.reject(f"must have as many texts as labels, got {len(answers)} and {len(labels)}")
    key = row.text("answerKey").strip()
    if key not in labels:
        row.reject(f"field 'answerKey' must be one of {', '.join(labels)}, got {key!r}")
    return answers, labels, labels.index(key)


def ask_by_label(row: Row, question: str) -> ChoiceForm:
    """The question and its choices on one line, as the paper's code asks ARC and OpenBookQA."""
    answers, labels, gold = read_choices(row)
    choices = "".join(f" ({label}) {answer}" for label, answer in zip(labels, answers, strict=True))
    return choose_label(
        f"Please choose the correct answer to the question: {question}{choices}\nAnswer:",
        labels,
        gold,
    )


def _by_label(row: Row) -> ChoiceForm:
    return ask_by_label(row, row.text("question"))


def _by_text(row: Row) -> ChoiceForm:
    return choose_text_per_character(
        f"Question: {row.text('question')}\nAnswer:", *read_choices(row)
    )


ARC_EASY = ChoiceTask(
    name="arc_easy",
    evaluation_split="test",
    source=HubSource("allenai/ai2_arc", "ARC-Easy", _REVISION),
    by_label=_by_label,
    by_text=_by_text,
)
ARC_CHALLENGE = ChoiceTask(
    name="arc_challenge",
    evaluation_split="test",
    source=HubSource("allenai/ai2_arc", "ARC-Challenge", _REVISION),
    by_label=_by_label,
    by_text=_by_text,
)
