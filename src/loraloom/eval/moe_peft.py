"""Label scoring as MoE-PEFT does it, to repeat its numbers.

Every question is asked for all labels of its task's list, whether it has such a choice or not, and
a label counts by its last token alone. (MoE-PEFT also cuts long prompts on the right, where the
answer's cue is; that is not repeated.)

Source: MoE-PEFT `moe_peft/tasks/qa_tasks.py`, `moe_peft/evaluator.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from loraloom.data.tasks import ChoiceQuestion
from loraloom.data.tokens import TokenPair, encode_texts
from loraloom.errors import ConfigError, DataError

_ARC = ("1", "2", "3", "4", "A", "B", "C", "D", "E")

LABELS: dict[str, tuple[str, ...]] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "boolq": ("true", "false"),
    "openbookqa": ("A", "B", "C", "D"),
    "piqa": ("A", "B"),
    "social_i_qa": ("A", "B", "C"),
    "hellaswag": ("A", "B", "C", "D"),
    "winogrande": ("A", "B"),
}
"""Each task's list."""


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise a ConfigError if MoE-PEFT has no list of labels for a task."""
    unknown = [task for task in tasks if task not in LABELS]
    if unknown:
        raise ConfigError(
            f"compat moe-peft needs a task that MoE-PEFT has ({', '.join(LABELS)}), "
            f"got {', '.join(unknown)}"
        )


def with_all_labels(question: ChoiceQuestion) -> ChoiceQuestion:
    """Offer every label of the task's list, in its order."""
    labels, gold = LABELS[question.task], question.labels[question.gold]
    if gold not in labels:
        raise DataError(
            f"{question.task}, question {question.index}: its answer must be a label that MoE-PEFT "
            f"asks for ({', '.join(labels)}), got {gold!r}; leave out --compat"
        )
    return replace(
        question,
        contexts=question.contexts[:1] * len(labels),
        continuations=tuple(f" {label}" for label in labels),
        labels=labels,
        gold=labels.index(gold),
        normalizers=(1.0,) * len(labels),
    )


def encode_last_tokens(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChoiceQuestion]
) -> list[list[TokenPair]]:
    """Encode prompts and labels by themselves, and keep the last token of each label."""
    prompts = encode_texts(tokenizer, [question.contexts[0] for question in questions])
    texts = {text for question in questions for text in question.continuations}
    ids = dict(zip(sorted(texts), encode_texts(tokenizer, sorted(texts)), strict=True))
    return [
        [TokenPair(prompt, ids[text][-1:]) for text in question.continuations]
        for prompt, question in zip(prompts, questions, strict=True)
    ]
