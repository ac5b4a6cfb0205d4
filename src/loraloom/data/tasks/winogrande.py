"""WinoGrande: which of two names fills the blank `_` of a sentence.

`text` is partial scoring: each option is filled in, and the likelihood of the rest of the sentence,
the same for both, decides. The hub's configuration is the paper's, `winogrande_debiased`; its
validation split is that of every other size.
"""

from __future__ import annotations

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import (
    ChoiceForm,
    ChoiceTask,
    choose_label,
    lettered_lines,
    letters,
    published,
)


def _read_options(row: Row) -> tuple[list[str], int]:
    answer = row.text("answer").strip()
    gold = published(row, "answer", int(answer) - 1 if answer.isdigit() else -1, 2)
    return [row.text("option1"), row.text("option2")], gold


def _by_label(row: Row) -> ChoiceForm:
    options, gold = _read_options(row)
    prompt = (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        f"Sentence: {row.text('sentence')}{lettered_lines(options)}\nAnswer:"
    )
    return choose_label(prompt, letters(2), gold)


def _by_text(row: Row) -> ChoiceForm:
    options, gold = _read_options(row)
    before, blank, after = row.text("sentence").partition("_")
    if not blank:
        row.reject(f"field 'sentence' must have a blank '_', got {row['sentence']!r}")
    return ChoiceForm(
        contexts=tuple(before + option for option in options),
        continuations=(f" {after.strip()}",) * 2,
        normalizers=(1.0, 1.0),
        labels=letters(2),
        gold=gold,
    )


WINOGRANDE = ChoiceTask(
    name="winogrande",
    evaluation_split="validation",
    source=HubSource(
        "allenai/winogrande", "winogrande_debiased", "01e74176c63542e6b0bcb004dcdea22d94fb67b5"
    ),
    by_label=_by_label,
    by_text=_by_text,
)
