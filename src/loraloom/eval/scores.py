"""What adapters make of questions, held-out rows or preference pairs, by name; `base` is the base.

A row's loss is the sum over the tokens that training would learn from, in nats; an adapter's is the
sum over all rows by the number of those tokens, as `eval/loss` in metrics.jsonl.

A pair's margin is log p(chosen) - log p(rejected), each summed over its tokens. A reward margin is
β × the adapter's margin less the base model's, as in DPO, and the loss is DPO's, the mean of
-log σ(reward margin).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from loraloom.data.tasks import ChoiceQuestion, questions_digest
from loraloom.errors import DataError, not_finite
from loraloom.eval.comparison import BASE, Metric, TaskAnswers, compare, members_of
from loraloom.eval.held_out import HeldOutSet
from loraloom.eval.statistics import (
    PairedComparison,
    compare_losses,
    compare_paired,
    ratio_intervals,
    ratio_stderr,
    wilson_interval,
)

MAX_EXPONENT = 89
"""Loss from which on a perplexity, 4e38, says nothing."""


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

    def to_json(self) -> dict[str, Any]:
        """The accuracy as it stands in the JSON file."""
        interval = wilson_interval(self.accuracy, self.num_examples)
        beats = {"beats_majority": self.beats_majority}
        return {**asdict(self), **beats, "interval": list(interval)}


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


class Scores(ABC):
    """What adapters make of one data set, with the same items for each of them."""

    metric: ClassVar[Metric]
    """What adapters are compared by."""
    name: str
    details: Mapping[str, Any]
    """What is noted of the data set."""
    scores: Mapping[str, Sequence[Any]]
    """By adapter, one for each item."""

    @abstractmethod
    def figure(self, name: str) -> float:
        """An adapter's accuracy or loss, of which seeds have a mean."""

    @abstractmethod
    def compare(self, first: str, second: str) -> PairedComparison:
        """Compare two contestants on the same items."""

    @abstractmethod
    def summarise(self) -> dict[str, dict[str, Any]]:
        """Results by adapter, as in the JSON file."""

    @abstractmethod
    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what `--per-question` writes of each adapter and item."""

    @abstractmethod
    def check_finite(self) -> None:
        """Raise an AdapterError that names who gave a score that is not finite."""


def summarise(tasks: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """Results by adapter and task, as they stand in the JSON file under `results`."""
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for name, summary in task.summarise().items():
            results.setdefault(name, {})[task.name] = summary
    return results


@dataclass(frozen=True)
class TaskScores(Scores):
    """The scores of a task's questions."""

    metric: ClassVar[Metric] = "accuracy"
    name: str
    split: str
    scores: Mapping[str, Sequence[QuestionScore]]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> TaskAnswers:
        """Which questions were answered right."""
        first = next(iter(self.scores.values()))
        right = {name: tuple(one.correct for one in of) for name, of in self.scores.items()}
        return TaskAnswers(self.name, tuple(score.question.index for score in first), right)

    @override
    def figure(self, name: str) -> float:
        return fmean(score.correct for score in self.scores[name])

    @override
    def compare(self, first: str, second: str) -> PairedComparison:
        return compare(self.answers, first, second)

    @override
    def summarise(self) -> dict[str, dict[str, Any]]:
        return {name: self._summary(scores) for name, scores in self.scores.items()}

    def _summary(self, scores: Sequence[QuestionScore]) -> dict[str, Any]:
        num_truncated = sum(score.truncated for score in scores)
        groups = {name: one.to_json() for name, one in accuracy_by_group(scores).items()}
        return {
            **accuracy(scores).to_json(),
            "split": self.split,
            **({"num_truncated": num_truncated} if num_truncated else {}),
            **({"groups": groups} if groups else {}),
        }

    @override
    def lines(self) -> Iterator[dict[str, Any]]:
        for name, scores in self.scores.items():
            for score in scores:
                question, chosen = score.question, score.chosen
                yield {
                    "task": self.name,
                    "split": self.split,
                    "index": question.index,
                    "question": questions_digest([question])[:16],
                    "adapter": name,
                    "correct": score.correct,
                    "chosen": None if chosen is None else question.labels[chosen],
                    "correct_label": question.labels[question.gold],
                    "scores": list(score.scores),
                }

    @override
    def check_finite(self) -> None:
        for name, scores in self.scores.items():
            for score in scores:
                if not score.finite:
                    place = f"in {self.name}, question {score.question.index}"
                    raise not_finite("scores", score.log_likelihoods, [_adapter(name)], place)


@dataclass(frozen=True)
class _OfRows(Scores):
    """Losses of each row of a data set, summed over its tokens, in nats."""

    data: HeldOutSet
    scores: Mapping[str, Sequence[float]]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What results call the data set."""
        return self.data.name

    @property
    def details(self) -> Mapping[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is noted of the data set."""
        return self.data.details

    @override
    def check_finite(self) -> None:
        for name, losses in self.scores.items():
            for place, loss in zip(self.data.places, losses, strict=True):
                if not math.isfinite(loss):
                    row = f"in row {place + 1} of {self.name}"
                    raise not_finite("losses", loss, [_adapter(name)], row)


def _adapter(name: str) -> str | None:
    return None if name == BASE else name


@dataclass(frozen=True)
class HeldOutLosses(_OfRows):
    """How well adapters predict held-out rows."""

    metric: ClassVar[Metric] = "loss"

    @override
    def figure(self, name: str) -> float:
        return math.fsum(self.scores[name]) / sum(self.data.num_tokens)

    @override
    def compare(self, first: str, second: str) -> PairedComparison:
        return compare_losses(self._of(first), self._of(second), self.data.num_tokens)

    def _of(self, name: str) -> list[float]:
        """Losses of an adapter, or the mean of a group of seeds."""
        members = members_of(name, list(self.scores))
        return [fmean(seeds) for seeds in zip(*(self.scores[one] for one in members), strict=True)]

    @override
    def summarise(self) -> dict[str, dict[str, Any]]:
        lengths = np.asarray(self.data.num_tokens, dtype=np.float64)
        sums = np.column_stack([np.asarray(losses) for losses in self.scores.values()])
        intervals = ratio_intervals(sums, lengths)
        return {
            name: {
                "loss": self.figure(name),
                "stderr": ratio_stderr(column, lengths),
                "interval": list(interval),
                "perplexity": perplexity(self.figure(name)),
                "num_examples": len(lengths),
                "num_tokens": int(lengths.sum()),
                "split": self.details["split"],
            }
            for name, column, interval in zip(self.scores, sums.T, intervals, strict=True)
        }

    @override
    def lines(self) -> Iterator[dict[str, Any]]:
        for name, losses in self.scores.items():
            rows = zip(self.data.places, losses, self.data.num_tokens, strict=True)
            for place, loss, count in rows:
                row = {"dataset": self.name, "adapter": name, "index": place}
                yield {**row, "loss": loss, "num_tokens": count}


def perplexity(loss: int | float) -> float | None:
    """Compute exp(loss); None where that is no number any more."""
    return math.exp(loss) if loss < MAX_EXPONENT else None


@dataclass(frozen=True)
class PairLosses(_OfRows):
    """Whether adapters rank chosen answers above rejected ones; rows are the two in turn."""

    metric: ClassVar[Metric] = "accuracy"
    reference: Sequence[float]
    """The base model's losses."""

    @override
    def figure(self, name: str) -> float:
        return float(np.logaddexp(0, -self._reward_margins(name)).mean())

    @override
    def compare(self, first: str, second: str) -> PairedComparison:
        return compare_paired(self._shares_right(first), self._shares_right(second))

    @override
    def summarise(self) -> dict[str, dict[str, Any]]:
        return {name: self._summarise(name) for name in self.scores}

    @override
    def lines(self) -> Iterator[dict[str, Any]]:
        for name, losses in self.scores.items():
            answers = zip(losses[0::2], losses[1::2], self._reward_margins(name), strict=True)
            for place, (chosen, rejected, margin) in zip(
                self.data.places[0::2], answers, strict=True
            ):
                yield {
                    "dataset": self.name,
                    "adapter": name,
                    "index": place,
                    "correct": chosen < rejected,
                    "chosen_log_prob": -chosen,
                    "rejected_log_prob": -rejected,
                    "reward_margin": margin,
                }

    def _summarise(self, name: str) -> dict[str, Any]:
        margins = self._reward_margins(name)
        count = len(margins)
        right = fmean(_margins(self.scores[name]) > 0)
        values = np.column_stack([np.logaddexp(0, -margins), margins])
        ones = np.ones(count)
        loss, margin = (
            {"stderr": ratio_stderr(column, ones), "interval": list(interval)}
            for column, interval in zip(values.T, ratio_intervals(values, ones), strict=True)
        )
        return {
            "loss": self.figure(name),
            **loss,
            "accuracy": right,
            "accuracy_interval": list(wilson_interval(right, count)),
            "reward_accuracy": fmean(margins > 0),
            "reward_margin": fmean(margins),
            **{f"reward_margin_{key}": value for key, value in margin.items()},
            "num_examples": count,
            "num_tokens": sum(self.data.num_tokens),
            "split": self.details["split"],
        }

    def _reward_margins(self, name: str) -> np.ndarray:
        difference = _margins(self.scores[name]) - _margins(self.reference)
        return self.details["beta"] * difference

    def _shares_right(self, name: str) -> list[float]:
        members = members_of(name, list(self.scores))
        return np.mean([_margins(self.scores[one]) > 0 for one in members], axis=0).tolist()


def _margins(losses: Sequence[float]) -> np.ndarray:
    """Subtract log p(rejected) from log p(chosen) of each pair."""
    log_probs = -np.asarray(losses, dtype=np.float64)
    return log_probs[0::2] - log_probs[1::2]
