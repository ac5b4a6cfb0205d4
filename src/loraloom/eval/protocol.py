"""Choice scoring: the log-likelihood of every choice, for several adapters in one pass.

A question's choices are scored together, see likelihoods.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from loraloom.data.examples import ChoiceQuestion
from loraloom.eval.accuracy import Accuracy, QuestionScore, accuracy
from loraloom.eval.encoding import QuestionEncoder, encode_choices, fit_question
from loraloom.eval.likelihoods import (
    evaluating,
    make_all_rows,
    score_batch,
    token_batches,
    tokens_per_batch,
)
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
    on_progress: Callable[[int, int], None] | None = None,
    encode: QuestionEncoder = encode_choices,
) -> dict[str | None, list[QuestionScore]]:
    """Score every choice of every question with each adapter.

    Args:
        host: With the adapters; dropout is off meanwhile.
        tokenizer: The base model's.
        questions: In any order, of any tasks.
        adapters: Names; None is the base model.
        max_tokens_per_batch: Tokens of a batch, padding included; a question is never divided.
            None: 1,024 on a CPU, 16,384 elsewhere.
        on_progress: Told after each batch how many questions of how many are done.
        encode: What is scored of a choice; its whole continuation by default.

    Returns:
        For each adapter the scores in the order of the questions.

    Raises:
        DataError: If a choice has no tokens or doesn't fit the model.
        AdapterError: If the host lacks an adapter.
    """
    scores: BatchScores = {name: {} for name in adapters}
    num_done = 0
    for batch in iter_scores(host, tokenizer, questions, adapters, max_tokens_per_batch, encode):
        for name, by_place in batch.items():
            scores[name].update(by_place)
        num_done += len(batch[adapters[0]])
        if on_progress is not None:
            on_progress(num_done, len(questions))
    places = range(len(questions))
    return {name: [by_place[place] for place in places] for name, by_place in scores.items()}


def iter_scores(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
    max_tokens_per_batch: int | None = None,
    encode: QuestionEncoder = encode_choices,
) -> Iterator[BatchScores]:
    """Score questions batch by batch, the longest first; see `score_questions`."""
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
        batch = [rows[place] for place in places]
        with evaluating(host):
            scores = score_batch(host, batch, adapters)
        likelihoods = [[[pair.log_likelihood for pair in q] for q in qs] for qs in scores]
        yield {
            name: {
                place: QuestionScore(questions[place], tuple(choices), encoded[place].truncated)
                for place, choices in zip(places, by_question, strict=True)
            }
            for name, by_question in zip(adapters, likelihoods, strict=True)
        }
