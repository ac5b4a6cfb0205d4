"""OpenBookQA: elementary science questions that need a fact and some common sense."""

from __future__ import annotations

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.arc import ask_by_label, read_choices
from loraloom.data.tasks.choice_task import ChoiceForm, ChoiceTask, choose_text_per_character


def _by_label(row: Row) -> ChoiceForm:
    return ask_by_label(row, row.text("question_stem"))


def _by_text(row: Row) -> ChoiceForm:
    return choose_text_per_character(row.text("question_stem"), *read_choices(row))


OPENBOOKQA = ChoiceTask(
    name="openbookqa",
    evaluation_split="test",
    source=HubSource("allenai/openbookqa", "main", "388097ea7776314e93a529163e0fea805b8a6454"),
    by_label=_by_label,
    by_text=_by_text,
)
