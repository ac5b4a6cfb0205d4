"""Choice scoring: the log-likelihood of every choice, for several adapters in one pass.

Axes: A adapters, B rows, L tokens, N scored tokens, D hidden.

Questions are sorted by length and batched by tokens. A question's choices share a row (rows.py),
and a batch holds its rows once for each adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.data.examples import ChoiceQuestion
from loraloom.eval.accuracy import Accuracy, QuestionScore, accuracy
from loraloom.eval.cache import LogLikelihoods, ScoreCache
from loraloom.eval.encoding import EncodedQuestion, QuestionEncoder, encode_choices, fit_question
from loraloom.eval.rows import TokenRow, collate_rows, make_rows
from loraloom.models.host import Host

_TOKENS_PER_BATCH = {"cpu": 1024}
_TOKENS_PER_BATCH_ELSEWHERE = 16384

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
) -> dict[str | None, list[QuestionScore]]:
    """Score every choice of every question with each adapter.

    Args:
        host: With the adapters; dropout is off meanwhile.
        tokenizer: The base model's.
        questions: In any order, of any tasks.
        adapters: Names; None is the base model.
        max_tokens_per_batch: Tokens of a batch, padding included; a question is never divided.
            None: 1,024 on a CPU, 16,384 elsewhere.
        on_progress: Told after each batch the places of its questions.
        encode: What is scored of a choice; its whole continuation by default.
        cache: Scores that are known, and where new ones are kept after each batch.

    Returns:
        For each adapter the scores in the order of the questions.

    Raises:
        DataError: If a choice has no tokens or doesn't fit the model.
        AdapterError: If the host lacks an adapter.
    """
    scores: BatchScores = {name: {} for name in adapters}
    for batch in iter_scores(
        host, tokenizer, questions, adapters, max_tokens_per_batch, encode, cache
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
    rows = _make_all_rows(host, encoded)
    budget = max_tokens_per_batch or _TOKENS_PER_BATCH.get(
        host.device.type, _TOKENS_PER_BATCH_ELSEWHERE
    )
    for places in _batches(rows, budget // len(adapters)):
        likelihoods = _find_or_score(host, encoded, rows, places, adapters, cache)
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
    cache: ScoreCache | None,
) -> dict[str | None, dict[int, LogLikelihoods]]:
    """Take what the cache knows of a batch, and compute and keep the rest."""
    known: dict[str | None, dict[int, LogLikelihoods]] = {name: {} for name in adapters}
    if cache is not None:
        for name in adapters:
            found = {place: cache.find(name, encoded[place].pairs) for place in places}
            known[name] = {place: value for place, value in found.items() if value is not None}
    for missing, names in _by_missing(places, known).items():
        batch = [rows[place] for place in missing]
        with _evaluating(host):
            likelihoods = _score_batch(host, batch, names)
        for name, by_question in zip(names, likelihoods, strict=True):
            new = dict(zip(missing, map(tuple, by_question), strict=True))
            known[name] |= new
            if cache is not None:
                cache.add(name, [(encoded[place].pairs, value) for place, value in new.items()])
    return known


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


@contextmanager
def _evaluating(host: Host) -> Iterator[None]:
    """Put the host into eval mode without gradients, and back."""
    was_training = host.training
    host.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        host.train(was_training)


def _make_all_rows(host: Host, questions: Sequence[EncodedQuestion]) -> list[list[TokenRow]]:
    """Make each question's rows; choices share one where attention takes a mask of our own.

    transformers leaves such a mask as it is: FlashAttention takes none, and a sliding window would
    be missing from it.
    """
    rows = [make_rows(question.pairs, shared=True) for question in questions]
    longest = max((len(row.input_ids) for shared in rows for row in shared), default=0)
    window = host.config.to_dict().get("sliding_window")
    takes_mask = host.config._attn_implementation in ("sdpa", "eager")
    if takes_mask and (window is None or longest <= window):
        return rows
    return [make_rows(question.pairs, shared=False) for question in questions]


def _batches(questions: Sequence[Sequence[TokenRow]], max_tokens: int) -> Iterator[list[int]]:
    """Cut questions into batches of like lengths; each is a list of places."""
    lengths = [max(len(row.input_ids) for row in rows) for rows in questions]
    batch: list[int] = []
    num_rows = 0
    for place in sorted(range(len(questions)), key=lambda place: -lengths[place]):
        added = len(questions[place])
        if batch and (num_rows + added) * lengths[batch[0]] > max_tokens:
            yield batch
            batch, num_rows = [], 0
        batch.append(place)
        num_rows += added
    if batch:
        yield batch


def _score_batch(
    host: Host, questions: Sequence[Sequence[TokenRow]], adapters: Sequence[str | None]
) -> list[list[list[float]]]:
    """Compute log-likelihoods by adapter, question and choice."""
    rows = [row for question_rows in questions for row in question_rows]
    token_likelihoods = _score_rows(host, rows, adapters)
    owners = _owners(questions)
    num_choices = [1 + max(c for row in rows for c in row.choices) for rows in questions]
    sums = token_likelihoods.new_zeros(len(adapters), sum(num_choices))
    sums.index_add_(1, torch.tensor(owners), token_likelihoods)
    return [[choices.tolist() for choices in by_adapter.split(num_choices)] for by_adapter in sums]


def _owners(questions: Sequence[Sequence[TokenRow]]) -> list[int]:
    """The choice that each scored token belongs to, counted through all questions."""
    owners, first = [], 0
    for rows in questions:
        choices = [choice for row in rows for choice in row.choices]
        owners += [first + choice for choice in choices]
        first += max(choices) + 1
    return owners


def _score_rows(host: Host, rows: Sequence[TokenRow], adapters: Sequence[str | None]) -> Tensor:
    """Compute the log-likelihood of every scored token, [A, N], in float64 on the CPU."""
    batch = collate_rows(rows, host.dtype, host.device)
    copies = len(adapters)
    mask = batch.attention_mask
    hidden_states = host.hidden(
        batch.input_ids.repeat(copies, 1),
        mask.repeat(copies, *[1] * (mask.dim() - 1)),
        [name for name in adapters for _ in rows],
        token_mask=batch.token_mask.repeat(copies, 1),
        position_ids=batch.position_ids.repeat(copies, 1),
    ).last_hidden_state
    by_adapter = hidden_states.view(copies, -1, hidden_states.shape[-1])  # (A, B L, D)
    states = by_adapter[:, batch.predictors].flatten(0, 1)  # (A N, D)
    losses = host.token_losses(states, batch.targets.repeat(copies))
    return -losses.cpu().double().view(copies, -1)
