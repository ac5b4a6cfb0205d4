"""Choice scoring: the log-likelihood of every choice, for several adapters in one pass.

A question's choices are scored together, see `loraloom.generation.scoring`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from transformers import PreTrainedTokenizerBase

from loraloom.data.tasks import ChoiceQuestion
from loraloom.data.tokens import TokenPair, encode_pairs
from loraloom.eval.cache import LogLikelihoods, ScoreCache, Tokens
from loraloom.eval.scores import QuestionScore, accuracy
from loraloom.generation.rows import fit_pair
from loraloom.generation.scoring import (
    Group,
    OnRouting,
    group_rows,
    score_groups,
    token_batches,
    tokens_per_batch,
)
from loraloom.models.host import Host

QuestionEncoder = Callable[
    [PreTrainedTokenizerBase, Sequence[ChoiceQuestion]], list[list[TokenPair]]
]
"""From questions to the context and the scored continuation of each of their choices."""


def score_accuracy(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
) -> dict[str | None, float]:
    """Compute the share of questions that each adapter answers right; see `score_questions`."""
    scores = score_questions(host, tokenizer, questions, adapters)
    return {name: accuracy(scores[name]).accuracy for name in adapters}


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


def score_questions(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
    max_tokens_per_batch: int | None = None,
    on_progress: Callable[[Sequence[int]], None] | None = None,
    encode: QuestionEncoder = encode_choices,
    cache: ScoreCache | None = None,
    on_routing: OnRouting | None = None,
) -> dict[str | None, list[QuestionScore]]:
    """Score every choice of every question with each adapter, batch by batch, the longest first.

    Batches are cut as if nothing were known, so that an interrupted evaluation goes on with the
    batches that it would have had, and to the same numbers.
    """
    if not adapters:
        return {}
    encoded = encode(tokenizer, questions)
    max_length = host.config.max_position_embeddings
    fitted = [_fit(*pair, max_length) for pair in zip(questions, encoded, strict=True)]
    rows = group_rows(host, fitted)
    scores = score_kept(
        host, rows, fitted, adapters, max_tokens_per_batch, on_progress, cache, on_routing
    )
    return {
        name: [
            QuestionScore(question, scores[name, place], fitted[place] != encoded[place])
            for place, question in enumerate(questions)
        ]
        for name in adapters
    }


def score_kept(
    host: Host,
    rows: Sequence[Group],
    tokens: Sequence[Tokens],
    adapters: Sequence[str | None],
    max_tokens_per_batch: int | None = None,
    on_progress: Callable[[Sequence[int]], None] | None = None,
    cache: ScoreCache | None = None,
    on_routing: OnRouting | None = None,
) -> dict[tuple[str | None, int], LogLikelihoods]:
    """Score groups of rows with each adapter, batch by batch, and keep what was computed."""
    budget = max_tokens_per_batch or tokens_per_batch(host)
    batches = list(token_batches(rows, budget // len(adapters)))
    scores: dict[tuple[str | None, int], LogLikelihoods] = {}

    def score(places: Sequence[int]) -> list[LogLikelihoods]:
        keys = list(product(adapters, places))
        known = {
            (name, place): values
            for name, place in keys
            if cache is not None and (values := cache.find(name, tokens[place])) is not None
        }
        missing = [key for key in keys if key not in known]
        scored = score_groups(host, rows, missing, budget, on_routing)
        new = {
            key: tuple(pair.log_likelihood for pair in pairs)
            for key, pairs in zip(missing, scored, strict=True)
        }
        if cache is not None:
            cache.add([(name, tokens[place], new[name, place]) for name, place in missing])
        return [(known | new)[key] for key in keys]

    with host.prepared():
        for places, values in zip(batches, host.ranks.spread(batches, score), strict=True):
            scores |= dict(zip(product(adapters, places), values, strict=True))
            if on_progress is not None:
                on_progress(places)
    return scores


def _fit(question: ChoiceQuestion, pairs: Sequence[TokenPair], max_length: int) -> list[TokenPair]:
    name = f"{question.task}, question {question.index}: a choice"
    return [fit_pair(pair, max_length, name) for pair in pairs]
