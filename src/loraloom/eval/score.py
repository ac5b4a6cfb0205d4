"""Choice questions scored by several adapters in one pass: the log-likelihood of every choice.

A question's choices are scored together, see `loraloom.generation.scoring`.
"""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, product
from statistics import fmean
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from loraloom.data.tasks import ChoiceQuestion, QuestionSet, questions_digest
from loraloom.data.tokens import TokenPair, encode_pairs, encode_texts
from loraloom.errors import ConfigError, not_finite
from loraloom.eval.cache import ScoreCache, Tokens
from loraloom.eval.results import BASE, Fields, Metric, PairedComparison
from loraloom.eval.routing import RoutingTally
from loraloom.eval.statistics import Pair, compare_paired, compare_ratios, seed_values, share_fields
from loraloom.generation import scoring
from loraloom.generation.scoring import fit_pair
from loraloom.host.host import Host
from loraloom.terminal import show_progress

# Of a question's choices.
LogLikelihoods = tuple[float, ...]

# What MoE-PEFT asks for in each task, whether a question has such a choice or not; from its
# `moe_peft/tasks/qa_tasks.py`. (That it cuts long prompts on the right isn't repeated.)
MOE_PEFT_LABELS: dict[str, tuple[str, ...]] = {
    "arc_easy": tuple("1234ABCDE"),
    "arc_challenge": tuple("1234ABCDE"),
    "openbookqa": tuple("ABCD"),
    "hellaswag": tuple("ABCD"),
    "piqa": ("A", "B"),
    "winogrande": ("A", "B"),
    "boolq": ("true", "false"),
    "social_i_qa": ("A", "B", "C"),
}


@dataclass(frozen=True)
class Scorer:
    """Adapters that are scored together (None is the base model), and how they are evaluated."""

    host: Host
    tokenizer: PreTrainedTokenizerBase
    adapters: Sequence[str | None]
    max_tokens_per_batch: int | None = None
    """Size of a batch, with the tokens of all adapters."""
    cache: ScoreCache | None = None
    console: Console | None = None
    """Where progress is shown."""
    pairs: Sequence[Pair] = ()
    """Who is compared with whom."""
    files: Mapping[str, Fields] = field(default_factory=dict)
    """The adapters' files as they were when they were read: training replaces checkpoints."""
    command: str = ""
    compat: Literal["moe-peft"] | None = None

    def score(
        self,
        rows: Sequence[scoring.Group],
        tokens: Sequence[Tokens],
        on_progress: Callable[[Sequence[int]], None] | None = None,
        on_routing: scoring.OnRouting | None = None,
    ) -> dict[str | None, list[LogLikelihoods]]:
        budget = self.max_tokens_per_batch or scoring.tokens_per_batch(self.host)

        def compute(missing: Sequence[tuple[str | None, int]]) -> list[LogLikelihoods]:
            scored = scoring.score_groups(self.host, rows, missing, budget, on_routing)
            return [tuple(pair.log_likelihood for pair in pairs) for pairs in scored]

        def score_batch(indices: Sequence[int]) -> dict[Any, LogLikelihoods]:
            requests = list(product(self.adapters, indices))
            keys = [(adapter, tokens[index]) for adapter, index in requests]
            scored = self.remember(keys, requests, compute)
            return dict(zip(requests, scored, strict=True))

        # cut as if nothing were cached, so that an interrupted evaluation goes on with the batches
        # that it would have had, and to the same numbers
        batches = list(scoring.token_batches(rows, budget // len(self.adapters)))
        scored_batches = self.host.ranks.spread(batches, score_batch)
        scores: dict[tuple[str | None, int], LogLikelihoods] = {}
        for indices, batch_scores in zip(batches, scored_batches, strict=True):
            scores |= batch_scores
            if on_progress is not None:
                on_progress(indices)
        by_adapter = {}
        for adapter in self.adapters:
            by_adapter[adapter] = [scores[adapter, index] for index in range(len(rows))]
        return by_adapter

    def remember(
        self,
        keys: Sequence[tuple[str | None, Tokens]],
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], Sequence[tuple[Any, ...]]],
    ) -> list[tuple[Any, ...]]:
        """Return what is cached of adapters and tokens; compute and cache what is missing."""
        if self.cache is None:
            return list(compute(items))
        results = self.cache.find(keys)
        missing = [index for index, result in enumerate(results) if result is None]
        computed = compute([items[index] for index in missing])
        for index, result in zip(missing, computed, strict=True):
            results[index] = result
        if missing:
            self.cache.add([(*keys[index], results[index]) for index in missing])
        return results


@dataclass(frozen=True)
class QuestionScore:
    """The log-likelihoods of a question's choices; `truncated` if its context was cut to fit."""

    question: ChoiceQuestion
    log_likelihoods: LogLikelihoods
    truncated: bool = False

    @cached_property
    def scores(self) -> tuple[float, ...]:
        return tuple(map(operator.truediv, self.log_likelihoods, self.question.normalizers))

    @property
    def chosen(self) -> int | None:
        """The choice with the highest score, the first of equals; None where the model diverged."""
        if not all(map(math.isfinite, self.scores)):
            return None
        return self.scores.index(max(self.scores))

    @property
    def correct(self) -> bool:
        return self.chosen == self.question.gold


def score_questions(
    scorer: Scorer,
    questions: Sequence[ChoiceQuestion],
    **observers: Any,
) -> dict[str | None, list[QuestionScore]]:
    """Score every choice with each adapter; see `Scorer.score`. Texts are split as in training."""
    encode = _encode_choices if scorer.compat is None else _encode_last_tokens
    max_length = scorer.host.config.max_position_embeddings
    fitted: list[list[TokenPair]] = []
    truncated: list[bool] = []
    for question, pairs in zip(questions, encode(scorer.tokenizer, questions), strict=True):
        subject = f"{question.task}, question {question.index}: a choice"
        fitted.append([fit_pair(pair, max_length, subject) for pair in pairs])
        truncated.append(fitted[-1] != pairs)
    scores = scorer.score(scoring.group_rows(scorer.host, fitted), fitted, **observers)
    return {
        adapter: list(map(QuestionScore, questions, log_likelihoods, truncated))
        for adapter, log_likelihoods in scores.items()
    }


def _encode_choices(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChoiceQuestion]
) -> list[list[TokenPair]]:
    texts: list[tuple[str, str]] = []
    for question in questions:
        texts += zip(question.contexts, question.continuations, strict=True)
    pairs = iter(encode_pairs(tokenizer, texts))
    return [list(islice(pairs, len(question.contexts))) for question in questions]


def _encode_last_tokens(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChoiceQuestion]
) -> list[list[TokenPair]]:
    """Encode each label's last token, and its prompt apart: as MoE-PEFT's `evaluator.py`."""
    prompts = encode_texts(tokenizer, [question.contexts[0] for question in questions])
    encoded = []
    for prompt, question in zip(prompts, questions, strict=True):
        labels = encode_texts(tokenizer, question.continuations)
        encoded.append([TokenPair(prompt, label[-1:]) for label in labels])
    return encoded


def with_all_labels(question: ChoiceQuestion) -> ChoiceQuestion:
    """Offer every label of MoE-PEFT's list for the task, in its order."""
    labels = MOE_PEFT_LABELS.get(question.task, ())
    gold = question.labels[question.gold]
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
    scores = score_questions(Scorer(host, tokenizer, adapters), questions)
    return {name: fmean(score.correct for score in answers) for name, answers in scores.items()}


def summarise(scores: Sequence[QuestionScore]) -> Fields:
    fields = share_fields([score.correct for score in scores])
    fields["majority"] = majority_share([score.question for score in scores])
    fields["beats_majority"] = fields["accuracy"] > fields["majority"]
    return fields


def majority_share(questions: Sequence[ChoiceQuestion]) -> float:
    """Compute the share of questions that the best constant label, or text, gets right."""
    labels: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for question in questions:
        labels[question.labels[question.gold]] += 1
        # choices that differ in their contexts have one text, which answers nothing
        if len(set(question.continuations)) > 1:
            texts[question.continuations[question.gold]] += 1
    most = max([*labels.values(), *texts.values()])
    return most / len(questions)


@dataclass
class Scores:
    """What adapters make of a data set, by adapter (`base` is the base model)."""

    name: str
    details: Mapping[str, Any]
    metric: Metric = "accuracy"
    num_tokens: Sequence[int] = ()  # of each item, for a loss
    results: dict[str, Fields] = field(default_factory=dict)
    values: dict[str, Sequence[int | float]] = field(default_factory=dict)
    """What is compared of each item."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """What `--per-question` writes."""

    def compare(self, first: str, second: str) -> PairedComparison:
        first_values = seed_values(self.values, first)
        second_values = seed_values(self.values, second)
        if self.num_tokens:
            return compare_ratios(first_values, second_values, self.num_tokens, better=-1)
        return compare_paired(first_values, second_values)


def score_choices(data: QuestionSet, scorer: Scorer, tally: RoutingTally) -> Scores:
    if scorer.compat is not None:
        data = replace(data, questions=[with_all_labels(question) for question in data.questions])
    questions = data.questions
    groups = [question.group for question in questions]
    on_routing = tally.observe(data.task, len(questions), groups)
    # characters that the model reads: different contexts once, and every continuation
    sizes = [sum(map(len, {*x.contexts, *x.continuations})) for x in questions]
    with show_progress(scorer.console, data.task, sizes) as advance:
        scores = score_questions(scorer, questions, on_progress=advance, on_routing=on_routing)
    origins = [f"in {data.task}, question {question.index}" for question in questions]
    for adapter, answers in scores.items():
        check_finite("scores", adapter, [answer.log_likelihoods for answer in answers], origins)
    return task_scores(data, {adapter or BASE: answers for adapter, answers in scores.items()})


def check_finite(
    kind: str, adapter: str | None, scores: Sequence[Sequence[float]], origins: Sequence[str]
) -> None:
    for values, origin in zip(scores, origins, strict=True):
        if not all(map(math.isfinite, values)):
            shown = values[0] if len(values) == 1 else values
            raise not_finite(kind, shown, [adapter], origin)


def task_scores(data: QuestionSet, scores: Mapping[str, Sequence[QuestionScore]]) -> Scores:
    """Sum up how adapters answered a task's questions, and note what was asked."""
    details = {
        "split": data.split,
        "scoring": data.scoring,
        "num_questions": len(data.questions),
        "questions_sha256": questions_digest(data.questions),
        "source": data.source,
    }
    task = Scores(data.task, details)
    digests = [questions_digest([question])[:16] for question in data.questions]
    for name, answers in scores.items():
        task.results[name] = _task_result(answers, data.split)
        task.values[name] = [answer.correct for answer in answers]
        for answer, digest in zip(answers, digests, strict=True):
            labels = answer.question.labels
            line = {
                "task": data.task,
                "split": data.split,
                "index": answer.question.index,
                "question": digest,
                "adapter": name,
                "correct": answer.correct,
                "chosen": None if answer.chosen is None else labels[answer.chosen],
                "correct_label": labels[answer.question.gold],
                "scores": list(answer.scores),
            }
            task.lines.append(line)
    return task


def _task_result(scores: Sequence[QuestionScore], split: str) -> Fields:
    result = summarise(scores) | {"split": split}
    num_truncated = sum(score.truncated for score in scores)
    if num_truncated:
        result["num_truncated"] = num_truncated
    by_group = defaultdict[str, list[QuestionScore]](list)
    for score in scores:
        if score.question.group is not None:
            by_group[score.question.group].append(score)
    if by_group:
        result["groups"] = {group: summarise(by_group[group]) for group in sorted(by_group)}
    return result
