"""The eight tasks of the MixLoRA paper: science exams, everyday reasoning, yes/no questions.

A task is a function that reads a row, one for each scoring that writes the prompt, and an entry in
`TASKS` of this package. One without code is a YAML file (task_file.py).
"""

from __future__ import annotations

import re

from loraloom.data.locations import HubSource
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import (
    ChoiceForm,
    ChoiceTask,
    choose_label,
    choose_text,
    choose_text_per_character,
    lettered_lines,
    letters,
    published,
)
from loraloom.errors import shown

Choices = tuple[list[str], tuple[str, ...], int]
"""Answers, labels, and the index of the right one."""

# ARC and OpenBookQA: science questions of school exams. Labels are A to E in most rows and 1 to 4
# in some; each question keeps its own.


def _read_lettered(row: Row) -> Choices:
    choices = row.part("choices")
    answers, labels = choices.texts("text"), choices.texts("label")
    if len(answers) != len(labels) or not labels:
        choices.reject(f"must have as many texts as labels, got {len(answers)} and {len(labels)}")
    key = row.text("answerKey").strip()
    if key not in labels:
        row.reject(f"field 'answerKey' must be one of {', '.join(labels)}, got {shown(key)}")
    return answers, tuple(labels), labels.index(key)


def _exam_by_label(row: Row, question: str) -> ChoiceForm:
    answers, labels, gold = _read_lettered(row)
    choices = "".join(f" ({label}) {answer}" for label, answer in zip(labels, answers, strict=True))
    prompt = f"Please choose the correct answer to the question: {question}{choices}\nAnswer:"
    return choose_label(prompt, labels, gold)


def _arc(name: str, configuration: str) -> ChoiceTask:
    revision = "210d026faf9955653af8916fad021475a3f00453"
    return ChoiceTask(
        name=name,
        evaluation_split="test",
        source=HubSource("allenai/ai2_arc", configuration, revision),
        by_label=lambda row: _exam_by_label(row, row.text("question")),
        by_text=lambda row: choose_text_per_character(
            f"Question: {row.text('question')}\nAnswer:", *_read_lettered(row)
        ),
    )


ARC_EASY = _arc("arc_easy", "ARC-Easy")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-Challenge")
OPENBOOKQA = ChoiceTask(
    name="openbookqa",
    evaluation_split="test",
    source=HubSource("allenai/openbookqa", "main", "388097ea7776314e93a529163e0fea805b8a6454"),
    by_label=lambda row: _exam_by_label(row, row.text("question_stem")),
    by_text=lambda row: choose_text_per_character(row.text("question_stem"), *_read_lettered(row)),
)

# BoolQ: yes/no questions that people typed into a search engine, with a passage each. `label` asks
# without the passage, as the paper's code does, `text` with it, as lm-eval does. The hub's copy is
# SuperGLUE's, which lm-eval reads: its passages begin with the title of their article, those of
# google/boolq don't; and its answer is in `label`.

_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def _read_truth(row: Row) -> bool:
    field = "label" if "label" in row and "answer" not in row else "answer"
    answer = str(row[field]).strip().lower()
    if answer not in _TRUTH:
        row.reject(
            f"field {field!r} must be true or false, got {shown(row[field])}; "
            "a split without published labels can't be used"
        )
    return _TRUTH[answer]


def _boolq_by_label(row: Row) -> ChoiceForm:
    question = f"{row.text('question')}?"
    prompt = f"Please answer the following question with true or false: {question}\nAnswer:"
    return choose_label(prompt, ("true", "false"), gold=0 if _read_truth(row) else 1)


def _boolq_by_text(row: Row) -> ChoiceForm:
    prompt = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    answers = ("no", "yes")
    return choose_text(prompt, answers, labels=answers, gold=1 if _read_truth(row) else 0)


BOOLQ = ChoiceTask(
    name="boolq",
    evaluation_split="validation",
    source=HubSource("aps/super_glue", "boolq", "3de24cf8022e94f4ee4b9d55a6f539891524d646"),
    by_label=_boolq_by_label,
    by_text=_boolq_by_text,
)

# PIQA: which of two ways reaches a goal in the physical world.


def _read_solutions(row: Row) -> Choices:
    gold = published(row, "label", row.integer("label"), 2)
    return [row.text("sol1"), row.text("sol2")], letters(2), gold


def _piqa_by_label(row: Row) -> ChoiceForm:
    solutions, labels, gold = _read_solutions(row)
    prompt = (
        "Below is a common task along with two possible solutions labeled (A) and (B). "
        "Please select the appropriate solution to achieve the task:\n"
        f"{row.text('goal')}\n{lettered_lines(solutions)}\n\nCorrect solution:"
    )
    return choose_label(prompt, labels, gold)


PIQA = ChoiceTask(
    name="piqa",
    evaluation_split="validation",
    source=HubSource("baber/piqa", None, "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
    by_label=_piqa_by_label,
    by_text=lambda row: choose_text_per_character(
        f"Question: {row.text('goal')}\nAnswer:", *_read_solutions(row)
    ),
)

# Social IQa: what people do next, feel or want in everyday situations. lm-eval calls it social_iqa
# and reports `acc` alone, so answers are compared by their sums.


def _read_answers(row: Row) -> Choices:
    gold = published(row, "label", row.integer("label") - 1, 3)
    return [row.text(f"answer{letter}") for letter in letters(3)], letters(3), gold


def _social_i_qa_by_label(row: Row) -> ChoiceForm:
    answers, labels, gold = _read_answers(row)
    prompt = (
        "Please choose the correct answer to the question.\n"
        f"Question: {row.text('context')} {row.text('question')}{lettered_lines(answers)}\nAnswer:"
    )
    return choose_label(prompt, labels, gold)


SOCIAL_I_QA = ChoiceTask(
    name="social_i_qa",
    evaluation_split="validation",
    source=HubSource("lighteval/siqa", None, "54c6a1f8cb6daf4f5abf24a601852612fb35eb25"),
    by_label=_social_i_qa_by_label,
    by_text=lambda row: choose_text(
        f"Q: {row.text('context')} {row.text('question')}\nA:", *_read_answers(row)
    ),
)

# HellaSwag: how a description of everyday activities goes on.


def clean(text: str) -> str:
    """Text without WikiHow's markup: a title becomes a sentence end, other brackets disappear.

    Source: lm-eval 0.4.13 `lm_eval/tasks/hellaswag/utils.py`, whose steps and order it keeps.
    """
    without_titles = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", without_titles).replace("  ", " ")


def _read_endings(row: Row) -> Choices:
    endings = row.texts("endings")
    gold = published(row, "label", row.integer("label"), len(endings))
    return endings, letters(len(endings)), gold


def _hellaswag_by_label(row: Row) -> ChoiceForm:
    endings, labels, gold = _read_endings(row)
    prompt = (
        "Please choose the correct ending to complete the given sentence.\n"
        f"Sentence: {row.text('activity_label')}. {row.text('ctx')}{lettered_lines(endings)}\n"
        "Answer:"
    )
    return choose_label(prompt, labels, gold)


def _hellaswag_by_text(row: Row) -> ChoiceForm:
    endings, labels, gold = _read_endings(row)
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}"
    prompt = clean(f"{row.text('activity_label')}: {context}")
    return choose_text_per_character(prompt, [clean(one) for one in endings], labels, gold)


HELLASWAG = ChoiceTask(
    name="hellaswag",
    evaluation_split="validation",
    source=HubSource("Rowan/hellaswag", None, "218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    by_label=_hellaswag_by_label,
    by_text=_hellaswag_by_text,
)

# WinoGrande: which of two names fills the blank `_` of a sentence. `text` is partial scoring: each
# option is filled in, and the likelihood of the rest of the sentence, the same for both, decides.
# The hub's configuration is the paper's; its validation split is that of every other size.


def _read_options(row: Row) -> tuple[list[str], int]:
    answer = row.text("answer").strip()
    gold = published(row, "answer", int(answer) - 1 if answer.isdecimal() else -1, 2)
    return [row.text("option1"), row.text("option2")], gold


def _winogrande_by_label(row: Row) -> ChoiceForm:
    options, gold = _read_options(row)
    prompt = (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        f"Sentence: {row.text('sentence')}{lettered_lines(options)}\nAnswer:"
    )
    return choose_label(prompt, letters(2), gold)


def _winogrande_by_text(row: Row) -> ChoiceForm:
    options, gold = _read_options(row)
    before, blank, after = row.text("sentence").partition("_")
    if not blank:
        row.reject(f"field 'sentence' must have a blank '_', got {shown(row['sentence'])}")
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
    by_label=_winogrande_by_label,
    by_text=_winogrande_by_text,
)
