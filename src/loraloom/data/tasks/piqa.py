"""PIQA: which of two ways reaches a goal in the physical world. Test labels are not published."""

from __future__ import annotations

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import (
    ChoiceForm,
    ChoiceTask,
    choose_label,
    choose_text_per_character,
    lettered_lines,
    letters,
    published,
)


def _read_solutions(row: Row) -> tuple[list[str], tuple[str, ...], int]:
    gold = published(row, "label", row.integer("label"), 2)
    return [row.text("sol1"), row.text("sol2")], letters(2), gold


def _by_label(row: Row) -> ChoiceForm:
    solutions, labels, gold = _read_solutions(row)
    prompt = (
        "Below is a common task along with two possible solutions labeled (A) and (B). "
        "Please select the appropriate solution to achieve the task:\n"
        f"{row.text('goal')}\n{lettered_lines(solutions)}\n\nCorrect solution:"
    )
    return choose_label(prompt, labels, gold)


def _by_text(row: Row) -> ChoiceForm:
    return choose_text_per_character(
        f"Question: {row.text('goal')}\nAnswer:", *_read_solutions(row)
    )


PIQA = ChoiceTask(
    name="piqa",
    evaluation_split="validation",
    source=HubSource("baber/piqa", None, "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
    by_label=_by_label,
    by_text=_by_text,
)
