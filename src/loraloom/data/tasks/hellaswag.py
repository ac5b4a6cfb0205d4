"""HellaSwag: how a description of everyday activities goes on."""

from __future__ import annotations

import re

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

_BRACKETED = re.compile(r"\[.*?\]")


def clean(text: str) -> str:
    """Text without WikiHow's markup: a title becomes a sentence end, other brackets disappear.

    Source: lm-eval 0.4.13 `lm_eval/tasks/hellaswag/utils.py`, whose steps and order it keeps.
    """
    without_titles = text.strip().replace(" [title]", ". ")
    return _BRACKETED.sub("", without_titles).replace("  ", " ")


def _read_endings(row: Row) -> tuple[list[str], tuple[str, ...], int]:
    endings = row.texts("endings")
    gold = published(row, "label", row.integer("label"), len(endings))
    return endings, letters(len(endings)), gold


def _by_label(row: Row) -> ChoiceForm:
    endings, labels, gold = _read_endings(row)
    prompt = (
        "Please choose the correct ending to complete the given sentence.\n"
        f"Sentence: {row.text('activity_label')}. {row.text('ctx')}{lettered_lines(endings)}\n"
        "Answer:"
    )
    return choose_label(prompt, labels, gold)


def _by_text(row: Row) -> ChoiceForm:
    endings, labels, gold = _read_endings(row)
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    return choose_text_per_character(
        clean(f"{row.text('activity_label')}: {context}"),
        [clean(ending) for ending in endings],
        labels,
        gold,
    )


HELLASWAG = ChoiceTask(
    name="hellaswag",
    evaluation_split="validation",
    source=HubSource("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    by_label=_by_label,
    by_text=_by_text,
)
