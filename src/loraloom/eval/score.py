"""Choice questions scored by several adapters in one pass: the log-likelihood of every choice.

A question's choices are scored together, see `loraloom.generation.scoring`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraloom.data.tasks import ChoiceQuestion, QuestionSet, questions_digest
from loraloom.data.tokens import TokenPair, encode_pairs, encode_texts
from loraloom.errors import ConfigError
from loraloom.eval.cache import ScoreCache, Tokens
from loraloom.eval.results import Fields, Metric, PairedComparison
from loraloom.eval.statistics import compare_losses, compare_paired, seed_values, share_fields
from loraloom.generation import scoring
from loraloom.generation.scoring import fit_pair
from loraloom.host.host import Host

# Of a question's choices.
LogLikelihoods = tuple[float, ...]

# What MoE-PEFT asks for in each task, whether a question has such a choice or not; from its
# `moe_peft/tasks/qa_tasks.py`. (That it cuts long prompts on the right isn't repeated.)
MOE_PEFT_LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("arc_easy", "arc_challenge"), tuple("1234ABCDE")),
    **dict.fromkeys(("openbookqa", "hellaswag"), tuple("ABCD")),
    **dict.fromkeys(("piqa", "winogrande"), ("A", "B")),
    "boolq": ("true", "false"),
    "social_i_qa": ("A", "B", "C"),
}


@dataclass(frozen=True)
class Scorer:
    """Adapters that are scored together, None is the base model; a batch is with all of them."""

    host: Host
    adapters: Sequence[str | None]
    max_tokens_per_batch: int | None = None
    cache: ScoreCache | None = None

    def score(
        self,
        rows: Sequence[scoring.Group],
        tokens: Sequence[Tokens],
        on_progress: Callable[[Sequence[int]], None] | None = None,
        on_routing: scoring.OnRouting | None = None,
    ) -> dict[str | None, list[LogLikelihoods]]:
        """Score groups of rows, the longest first, and keep the scores under `tokens`."""
        budget = self.max_tokens_per_batch or scoring.tokens_per_batch(self.host)
        # cut as if nothing were known, so that an interrupted evaluation goes on with the batches
        # that it would have had, and to the same numbers
        batches = list(scoring.token_batches(rows, budget // len(self.adapters)))
        scores: dict[tuple[str | None, int], LogLikelihoods] = {}

        def score(places: Sequence[int]) -> dict[Any, LogLikelihoods]:
            keys = list(product(self.adapters, places))

            def compute(missing: Sequence[tuple[str | None, int]]) -> list[LogLikelihoods]:
                scored = scoring.score_groups(self.host, rows, missing, budget, on_routing)
                return [tuple(pair.log_likelihood for pair in pairs) for pairs in scored]

            asked = [(name, tokens[place]) for name, place in keys]
            return dict(zip(keys, self.remember(asked, keys, compute), strict=True))

        for places, found in zip(batches, self.host.ranks.spread(batches, score), strict=True):
            scores |= found
            if on_progress is not None:
                on_progress(places)
        return {n: [scores[n, place] for place in range(len(rows))] for n in self.adapters}

    def remember(
        self,
        asked: Sequence[tuple[str | None, Tokens]],
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], Sequence[tuple[Any, ...]]],
    ) -> list[tuple[Any, ...]]:
        """Return what is kept of adapters and tokens; compute and keep what is missing."""
        known = self.cache.find(asked) if self.cache else [None] * len(asked)
        missing = [place for place, values in enumerate(known) if values is None]
        found = dict(zip(missing, compute([items[place] for place in missing]), strict=True))
        if self.cache and missing:
            self.cache.add([(*asked[place], values) for place, values in found.items()])
        return [found[place] if one is None else one for place, one in enumerate(known)]


@dataclass(frozen=True)
class QuestionScore:
    """The log-likelihoods of a question's choices; `truncated` if its context was cut to fit."""

    question: ChoiceQuestion
    log_likelihoods: LogLikelihoods
    truncated: bool = False

    @property
    def scores(self) -> tuple[float, ...]:
        """Log-likelihoods over the question's normalizers."""
        pairs = zip(self.log_likelihoods, self.question.normalizers, strict=True)
        return tuple(log_likelihood / normalizer for log_likelihood, normalizer in pairs)

    @property
    def chosen(self) -> int | None:
        """The choice with the highest score, the first of equals; None where the model diverged."""
        scores = self.scores
        return scores.index(max(scores)) if all(map(math.isfinite, scores)) else None

    @property
    def correct(self) -> bool:
        return self.chosen == self.question.gold


def score_questions(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    *,
    last_tokens: bool = False,
    **observers: Any,
) -> dict[str | None, list[QuestionScore]]:
    """Score every choice with each adapter; see `Scorer.score`. Texts are split as in training."""
    choices = [pair for x in questions for pair in zip(x.contexts, x.continuations, strict=True)]
    pairs = iter(encode_pairs(tokenizer, choices))
    encoded = [[next(pairs) for _ in question.contexts] for question in questions]
    if last_tokens:  # of each label, with its prompt apart: as MoE-PEFT's `moe_peft/evaluator.py`
        prompts = encode_texts(tokenizer, [question.contexts[0] for question in questions])
        texts = sorted({text for question in questions for text in question.continuations})
        ids = dict(zip(texts, encode_texts(tokenizer, texts), strict=True))
        encoded = [
            [TokenPair(prompt, ids[text][-1:]) for text in question.continuations]
            for prompt, question in zip(prompts, questions, strict=True)
        ]
    max_length = scorer.host.config.max_position_embeddings
    fitted = [
        [fit_pair(pair, max_length, f"{one.task}, question {one.index}: a choice") for pair in of]
        for one, of in zip(questions, encoded, strict=True)
    ]
    scores = scorer.score(scoring.group_rows(scorer.host, fitted), fitted, **observers)
    truncated = [one != whole for one, whole in zip(fitted, encoded, strict=True)]
    return {
        name: [QuestionScore(*one) for one in zip(questions, values, truncated, strict=True)]
        for name, values in scores.items()
    }


def with_all_labels(question: ChoiceQuestion) -> ChoiceQuestion:
    """Offer every label of MoE-PEFT's list for the task, in its order."""
    labels, gold = MOE_PEFT_LABELS.get(question.task, ()), question.labels[question.gold]
    if gold not in labels:
        raise ConfigError(
            f"compat moe-peft needs a task of {', '.join(MOE_PEFT_LABELS)}, and answers that "
            f"MoE-PEFT asks for, got {question.task}, question {question.index}, with {gold!r}"
        )
    return replace(
        question,
        contexts=question.contexts[:1] * len(labels),
        continuations=tuple(f" {label}" for label in labels),
        labels=labels,
        gold=labels.index(gold),
        normalizers=(1.0,) * len(labels),
    )


def score_accuracy(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
) -> dict[str | None, float]:
    scores = score_questions(Scorer(host, adapters), tokenizer, questions)
    return {name: sum(one.correct for one in of) / len(of) for name, of in scores.items()}


def summarise(scores: Sequence[QuestionScore]) -> Fields:
    """Compute the accuracy over questions, with its sample's standard error."""
    shares = share_fields([score.correct for score in scores])
    majority = majority_share([score.question for score in scores])
    return shares | {"majority": majority, "beats_majority": shares["accuracy"] > majority}


def majority_share(questions: Sequence[ChoiceQuestion]) -> float:
    """Compute the share of questions that the best constant label, or text, gets right."""
    # choices that differ in their contexts have one text, which answers nothing
    asked = [one for one in questions if len(set(one.continuations)) > 1]
    labels = Counter(question.labels[question.gold] for question in questions)
    texts = Counter(question.continuations[question.gold] for question in asked)
    return max([*labels.values(), *texts.values()]) / len(questions)


@dataclass(frozen=True)
class Scores:
    """What adapters make of a data set, by adapter (`base` is the base model)."""

    name: str
    details: Mapping[str, Any]
    results: Mapping[str, Fields]
    values: Mapping[str, Sequence[int | float]]  # what is compared of each item
    lines: Sequence[dict[str, Any]]  # what `--per-question` writes
    metric: Metric = "accuracy"
    num_tokens: Sequence[int] = ()  # of each item, for a loss

    def compare(self, first: str, second: str) -> PairedComparison:
        one, other = (seed_values(self.values, name) for name in (first, second))
        if self.num_tokens:
            return compare_losses(one, other, self.num_tokens)
        return compare_paired(one, other)


def task_scores(asked: QuestionSet, scores: Mapping[str, Sequence[QuestionScore]]) -> Scores:
    """Sum up how adapters answered a task's questions, and note what was asked."""
    details = {
        "split": asked.split,
        "scoring": asked.scoring,
        "num_questions": len(asked.questions),
        "questions_sha256": questions_digest(asked.questions),
        "source": asked.source,
    }
    results = {name: _task_result(of, asked.split) for name, of in scores.items()}
    values = {name: [one.correct for one in of] for name, of in scores.items()}
    digests = [questions_digest([question])[:16] for question in asked.questions]
    lines = [
        {
            "task": asked.task,
            "split": asked.split,
            "index": one.question.index,
            "question": digest,
            "adapter": name,
            "correct": one.correct,
            "chosen": None if one.chosen is None else one.question.labels[one.chosen],
            "correct_label": one.question.labels[one.question.gold],
            "scores": list(one.scores),
        }
        for name, of_adapter in scores.items()
        for one, digest in zip(of_adapter, digests, strict=True)
    ]
    return Scores(asked.task, details, results, values, lines)


def _task_result(scores: Sequence[QuestionScore], split: str) -> Fields:
    result = summarise(scores) | {"split": split}
    if num_truncated := sum(score.truncated for score in scores):
        result["num_truncated"] = num_truncated
    names = sorted({one.question.group for one in scores if one.question.group is not None})
    groups = {n: summarise([one for one in scores if one.question.group == n]) for n in names}
    return result | ({"groups": groups} if groups else {})
