"""Social IQa: what people do next, feel or want in everyday situations.

lm-eval calls it social_iqa and reports `acc` alone, so answers are compared by their sums.
"""

from __future__ import annotations

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import (
    ChoiceForm,
    ChoiceTask,
    choose_label,
    choose_text,
    lettered_lines,
    letters,
    published,
)


def _read_answers(row: Row) -> tuple[list[str], tuple[str, ...], int]:
    gold = published(row, "label", row.integer("label") - 1, 3)
    return [row.text(f"answer{letter}") for letter in letters(3)], letters(3), gold


def _by_label(row: Row) -> ChoiceForm:
    answers, labels, gold = _read_answers(row)
    prompt = (
        "Please choose the correct answer to the question.\n"
        f"Question: {row.text('context')} {row.text('question')}{lettered_lines(answers)}\nAnswer:"
    )
    return choose_label(prompt, labels, gold)


def _by_text(row: Row) -> ChoiceForm:
    return choose_text(f"Q: {row.text('context')} {row.text('question')}\nA:", *_read_answers(row))


SOCIAL_I_QA = ChoiceTask(
    name="social_i_qa",
    evaluation_split="validation",
    source=HubSource("lighteval/siqa", None, "54c6a1f8cb6daf4f5abf24a601852612fb35eb25"),
    by_label=_by_label,
    by_text=_by_text,
)
