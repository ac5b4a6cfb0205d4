"""Choice scoring: the log-likelihood of every choice, for several adapters in one pass.

A question's choices are scored together, see likelihoods.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from loraloom.data.examples import ChoiceQuestion
from loraloom.eval.accuracy import Accuracy, QuestionScore, accuracy
from loraloom.eval.cache import LogLikelihoods, ScoreCache
from loraloom.eval.encoding import EncodedQuestion, QuestionEncoder, encode_choices, fit_question
from loraloom.eval.likelihoods import (
    TellRouting,
    evaluating,
    make_all_rows,
    score_groups,
    token_batches,
    tokens_per_batch,
)
from loraloom.eval.routing import OnRouting, RoutedBatch
from loraloom.eval.rows import TokenRow
from loraloom.models.host import Host

BatchScores = dict[str | None, dict[int, QuestionScore]]
"""For each adapter, scores by the question's place in the list."""


def evaluate(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
) -> dict[str | None, Accuracy]:
    """Measure adapters on questions, whatever mode the host is in; see `score_questions`."""
    scores = score_questions(host, tokenizer, questions, adapters)
    return {name: accuracy(scores[name]) for name in adapters}


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
    """Score every choice of every question with each adapter.

    Args:
        host: With the adapters; dropout is off meanwhile.
        tokenizer: The base model's.
        questions: In any order, of any tasks.
        adapters: Names; None is the base model.
        max_tokens_per_batch: Tokens of a batch, padding and all adapters included; a question is
            never divided. None: 1,024 on a CPU, 16,384 elsewhere.
        on_progress: Told after each batch the places of its questions.
        encode: What is scored of a choice; its whole continuation by default.
        cache: Scores that are known, and where new ones are kept after each batch.
        on_routing: Told of every batch that is computed where mixtures sent its tokens.

    Returns:
        For each adapter the scores in the order of the questions.

    Raises:
        DataError: If a choice has no tokens or doesn't fit the model, or a question not the memory.
        AdapterError: If the host lacks an adapter.
    """
    scores: BatchScores = {name: {} for name in adapters}
    for batch in iter_scores(
        host, tokenizer, questions, adapters, max_tokens_per_batch, encode, cache, on_routing
    ):
        for name, by_place in batch.items():
            scores[name].update(by_place)
        if on_progress is not None:
            on_progress(list(batch[adapters[0]]))
    places = range(len(questions))
    return {name: [by_place[place] for place in places] for name, by_place in scores.items()}


def iter_scores(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
    max_tokens_per_batch: int | None = None,
    encode: QuestionEncoder = encode_choices,
    cache: ScoreCache | None = None,
    on_routing: OnRouting | None = None,
) -> Iterator[BatchScores]:
    """Score questions batch by batch, the longest first; see `score_questions`.

    Batches are cut as if nothing were known, so that an interrupted evaluation goes on with the
    batches that it would have had, and to the same numbers.
    """
    if not adapters:
        return
    max_length = host.config.max_position_embeddings
    encoded = [
        fit_question(question, pairs, max_length)
        for question, pairs in zip(questions, encode(tokenizer, questions), strict=True)
    ]
    rows = make_all_rows(host, [question.pairs for question in encoded])
    budget = max_tokens_per_batch or tokens_per_batch(host)
    for places in token_batches(rows, budget // len(adapters)):
        likelihoods = _find_or_score(
            host, encoded, rows, places, adapters, budget, cache, on_routing
        )
        yield {
            name: {
                place: QuestionScore(
                    questions[place], likelihoods[name][place], encoded[place].truncated
                )
                for place in places
            }
            for name in adapters
        }


def _find_or_score(
    host: Host,
    encoded: Sequence[EncodedQuestion],
    rows: Sequence[Sequence[TokenRow]],
    places: Sequence[int],
    adapters: Sequence[str | None],
    max_tokens: int,
    cache: ScoreCache | None,
    on_routing: OnRouting | None,
) -> dict[str | None, dict[int, LogLikelihoods]]:
    """Take what the cache knows of a batch, and compute and keep the rest."""
    known: dict[str | None, dict[int, LogLikelihoods]] = {name: {} for name in adapters}
    if cache is not None:
        for name in adapters:
            found = {place: cache.find(name, encoded[place].pairs) for place in places}
            known[name] = {place: value for place, value in found.items() if value is not None}
    for missing, names in _by_missing(places, known).items():
        with evaluating(host):
            scores = score_groups(host, rows, missing, names, max_tokens, _teller(on_routing, rows))
        for name, by_question in zip(names, scores, strict=True):
            likelihoods = [tuple(pair.log_likelihood for pair in pairs) for pairs in by_question]
            new = dict(zip(missing, likelihoods, strict=True))
            known[name] |= new
            if cache is not None:
                cache.add(name, [(encoded[place].pairs, value) for place, value in new.items()])
    return known


def _teller(on_routing: OnRouting | None, rows: Sequence[Sequence[TokenRow]]) -> TellRouting | None:
    """Make what tells a forward's routing with its questions' rows."""
    if on_routing is None:
        return None
    return lambda places, token_ids, routing: on_routing(
        RoutedBatch(places, [rows[place] for place in places], token_ids, routing)
    )


def _by_missing(
    places: Sequence[int], known: Mapping[str | None, Mapping[int, LogLikelihoods]]
) -> dict[tuple[int, ...], list[str | None]]:
    """Group adapters that lack the same questions of a batch, so that they are scored in one."""
    groups: dict[tuple[int, ...], list[str | None]] = {}
    for name, found in known.items():
        missing = tuple(place for place in places if place not in found)
        if missing:
            groups.setdefault(missing, []).append(name)
    return groups
