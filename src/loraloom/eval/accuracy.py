"""How many questions an adapter answers right, and how sure that number is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loraloom.data.examples import ChoiceQuestion
from loraloom.errors import DataError


@dataclass(frozen=True)
class QuestionScore:
    """What an adapter makes of a question.

    Args:
        question: The question.
        log_likelihoods: Of each choice's continuation, summed over its tokens.
        truncated: The context was cut from the left to fit the model.
    """

    question: ChoiceQuestion
    log_likelihoods: tuple[float, ...]
    truncated: bool = False

    @property
    def scores(self) -> tuple[float, ...]:
        """Log-likelihoods over the question's normalizers; the highest is chosen."""
        pairs = zip(self.log_likelihoods, self.question.normalizers, strict=True)
        return tuple(log_likelihood / normalizer for log_likelihood, normalizer in pairs)

    @property
    def finite(self) -> bool:
        """Whether every choice has a score; an adapter that has diverged gives NaN."""
        return all(map(math.isfinite, self.log_likelihoods))

    @property
    def chosen(self) -> int | None:
        """The choice with the highest score, the first of equals; None where one is not finite."""
        scores = self.scores
        return scores.index(max(scores)) if self.finite else None

    @property
    def correct(self) -> bool:
        """Whether the right choice is chosen."""
        return self.chosen == self.question.gold


@dataclass(frozen=True)
class Accuracy:
    """The share of questions answered right.

    Args:
        accuracy: In [0, 1].
        stderr: Its sample standard error, sqrt(p (1 - p) / (n - 1)); None for a single question.
        num_examples: How many questions.
        majority: The best accuracy of a constant answer; see `majority_share`.
    """

    accuracy: float
    stderr: float | None
    num_examples: int
    majority: float

    @property
    def beats_majority(self) -> bool:
        """Whether no constant answer is right as often."""
        return self.accuracy > self.majority


def accuracy(scores: Sequence[QuestionScore]) -> Accuracy:
    """Compute the accuracy over questions."""
    count = len(scores)
    if count == 0:
        raise DataError("accuracy needs at least one question, got none")
    share = sum(score.correct for score in scores) / count
    stderr = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return Accuracy(share, stderr, count, majority_share([score.question for score in scores]))


def majority_share(questions: Sequence[ChoiceQuestion]) -> float:
    """Compute the share of questions that the best constant answer gets right.

    A constant answer is the same label, or the same text, to every question: the majority class.
    """
    labels = Counter(question.labels[question.gold] for question in questions)
    texts = Counter(
        question.continuations[question.gold]
        for question in questions
        if len(set(question.continuations)) > 1  # else the choices differ in their contexts
    )
    return max([*labels.values(), *texts.values()]) / len(questions)


def accuracy_by_group(scores: Sequence[QuestionScore]) -> dict[str, Accuracy]:
    """Compute the accuracy of each group of questions, such as a skill; groups by name.

    Questions without a group are left out.
    """
    groups: dict[str, list[QuestionScore]] = {}
    for score in scores:
        if score.question.group is not None:
            groups.setdefault(score.question.group, []).append(score)
    return {group: accuracy(groups[group]) for group in sorted(groups)}
