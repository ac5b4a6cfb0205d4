"""Choice questions as tokens that fit the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from loraloom.data.examples import ChoiceQuestion
from loraloom.data.tokenising import TokenPair, encode_pairs
from loraloom.errors import DataError

QuestionEncoder = Callable[
    [PreTrainedTokenizerBase, Sequence[ChoiceQuestion]], list[list[TokenPair]]
]
"""From questions to the context and the scored continuation of each of their choices."""


@dataclass(frozen=True)
class EncodedQuestion:
    """A question's choices as tokens; `truncated` if a context had to be cut."""

    pairs: list[TokenPair]
    truncated: bool


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChoiceQuestion]
) -> list[list[TokenPair]]:
    """Encode every choice's context and whole continuation, split as in training."""
    texts = [
        text
        for question in questions
        for text in zip(question.contexts, question.continuations, strict=True)
    ]
    pairs = iter(encode_pairs(tokenizer, texts))
    return [[next(pairs) for _ in question.contexts] for question in questions]


def fit_question(
    question: ChoiceQuestion, pairs: Sequence[TokenPair], max_length: int
) -> EncodedQuestion:
    """Cut contexts from the left so that the model reads at most `max_length` tokens.

    The last token of a continuation is predicted, not read.

    Raises:
        DataError: If a continuation has no tokens, or leaves no room for its context.

    Source:
        lm-eval 0.4.13 `lm_eval/models/huggingface.py`, `_loglikelihood_tokens`: the same cut.
    """
    fitted = []
    for pair in pairs:
        room = max_length + 1 - len(pair.continuation)
        if not pair.continuation or room < 1:
            raise DataError(
                f"{question.task}, question {question.index}: a choice must have 1 to {max_length} "
                f"tokens, got {len(pair.continuation)}"
            )
        fitted.append(TokenPair(pair.context[-room:], pair.continuation))
    return EncodedQuestion(fitted, truncated=fitted != list(pairs))
