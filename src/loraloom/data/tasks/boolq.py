"""BoolQ: yes/no questions that people typed into a search engine, with a passage each.

`label` asks without the passage, as the paper's code does, `text` with it, as lm-eval does. The
hub's copy is SuperGLUE's, which lm-eval reads: its passages begin with the title of their article,
those of google/boolq don't.
"""

from __future__ import annotations

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import ChoiceForm, ChoiceTask, choose_label, choose_text

_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def _is_true(row: Row) -> bool:
    """The answer: field `answer` in google/boolq, `label` in SuperGLUE's copy."""
    field = "label" if "label" in row and "answer" not in row else "answer"
    answer = str(row[field]).strip().lower()
    if answer not in _TRUTH:
        row.reject(
            f"field {field!r} must be true or false, got {row[field]!r}; "
            "a split without published labels can't be used"
        )
    return _TRUTH[answer]


def _by_label(row: Row) -> ChoiceForm:
    question = f"{row.text('question')}?"
    return choose_label(
        f"Please answer the following question with true or false: {question}\nAnswer:",
        ("true", "false"),
        gold=0 if _is_true(row) else 1,
    )


def _by_text(row: Row) -> ChoiceForm:
    answers = ("no", "yes")
    return choose_text(
        f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:",
        answers,
        labels=answers,
        gold=1 if _is_true(row) else 0,
    )


BOOLQ = ChoiceTask(
    name="boolq",
    evaluation_split="validation",
    source=HubSource("aps/super_glue", "boolq", "3de24cf8022e94f4ee4b9d55a6f539891524d646"),
    by_label=_by_label,
    by_text=_by_text,
)
