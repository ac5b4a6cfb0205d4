"""Rows as token ids that fit the model: what is cut, what is dropped, what has a loss.

An answer is never cut: a prompt that is too long loses its beginning, and a row whose answer alone
is too long is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from loraloom.data.examples import NO_LOSS
from loraloom.data.rows import EmptyAnswerError, Row
from loraloom.data.tokenising import encode_pairs, encode_texts, eos_token, leading_tokens
from loraloom.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Piece:
    """Token ids with their labels (NO_LOSS where nothing is learnt)."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def is_learnt(self) -> list[bool]:
        """Whether each token is predicted, with a loss; the first never is."""
        return [False, *(label != NO_LOSS for label in self.labels[1:])]


@dataclass(frozen=True)
class EncodedRow:
    """What became of a row: no piece if it was dropped, several if a long text was divided.

    A preference that was not dropped is two pieces, the chosen and the rejected. `fault` says why a
    row can't be used, `is_empty` whether that is because it has no answer.
    """

    pieces: tuple[Piece, ...]
    is_cut: bool = False
    is_pair: bool = False
    fault: str = ""
    is_empty: bool = False


DROPPED = EncodedRow(pieces=())


@dataclass(frozen=True)
class LearntTokens:
    """Token ids, and whether each has a loss."""

    ids: list[int]
    is_learnt: list[bool]


def encode_each(
    rows: Sequence[Row],
    read: Callable[[Row], Item],
    encode: Callable[[list[Item]], list[EncodedRow]],
) -> list[EncodedRow]:
    """Read rows one by one and encode them together; a row that can't be used has its fault."""
    encoded: list[EncodedRow | None] = []
    items = []
    for row in rows:
        fault, is_empty = row.fault, False
        try:
            if not fault:
                items.append(read(row))
        except DataError as error:
            if not str(error).startswith(row.origin):
                raise
            fault = str(error).removeprefix(row.origin).lstrip(":, ")
            is_empty = isinstance(error, EmptyAnswerError)
        encoded.append(EncodedRow((), fault=fault, is_empty=is_empty) if fault else None)
    rest = iter(encode(items))
    return [next(rest) if row is None else row for row in encoded]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], max_length: int
) -> list[EncodedRow]:
    """Prompts with completions: loss on the completion and on the EOS that is put after it."""
    start = leading_tokens(tokenizer)
    return [
        fit(answered.ids, answered.is_learnt, start, max_length)
        for answered in learn_completions(tokenizer, texts)
    ]


def learn_completions(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]]
) -> list[LearntTokens]:
    """Prompts with completions in full length: loss on the completion and on an EOS after it."""
    end = eos_token(tokenizer)
    return [
        LearntTokens(
            [*context, *continuation, end],
            [False] * len(context) + [True] * (len(continuation) + 1),
        )
        for context, continuation in encode_pairs(tokenizer, texts)
    ]


def fit_pair(
    chosen: LearntTokens, rejected: LearntTokens, start: Sequence[int], max_length: int
) -> EncodedRow:
    """Two answers to one prompt, both cut from the left by what the longer one needs.

    So both keep the same part of the prompt. If either is dropped (see `fit`), both are.
    """
    longest = max(len(chosen.ids), len(rejected.ids))
    fitted = [
        fit(answer.ids, answer.is_learnt, start, max_length - (longest - len(answer.ids)))
        for answer in (chosen, rejected)
    ]
    if not all(row.pieces for row in fitted):
        return DROPPED
    pieces = tuple(piece for row in fitted for piece in row.pieces)
    return EncodedRow(pieces, is_cut=any(row.is_cut for row in fitted), is_pair=True)


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[EncodedRow]:
    """Plain texts with an EOS after them: loss on every token.

    Longer texts are divided. A piece begins with the last token of the one before, so that every
    token is predicted once.
    """
    end = eos_token(tokenizer)
    return [_divide([*ids, end], max_length) for ids in encode_texts(tokenizer, texts)]


def fit(
    ids: Sequence[int], is_learnt: Sequence[bool], start: Sequence[int], max_length: int
) -> EncodedRow:
    """A row of which one span or several are learnt, cut from the left to fit.

    What comes after the last span is left out. If the row is still too long it loses its beginning;
    a span that the cut goes through is no longer learnt. A row without a span, or whose last span
    does not fit with a token before it, is dropped.
    """
    if not any(is_learnt):
        return DROPPED
    stop = len(ids) - list(reversed(is_learnt)).index(True)
    labels = [
        token if learnt else NO_LOSS for token, learnt in zip(ids[:stop], is_learnt, strict=False)
    ]
    if stop <= max_length:
        return EncodedRow((Piece(tuple(ids[:stop]), tuple(labels)),))
    kept = list(start) if list(ids[: len(start)]) == list(start) else []
    cut = stop - max_length + len(kept)
    last_span = _span_start(is_learnt, stop)
    if cut >= last_span + bool(kept):
        return DROPPED
    if cut < last_span:
        _forget_span(labels, cut)
    piece = Piece((*kept, *ids[cut:stop]), (*[NO_LOSS] * len(kept), *labels[cut:]))
    return EncodedRow((piece,), is_cut=True)


def _span_start(is_learnt: Sequence[bool], stop: int) -> int:
    """Where the span that ends before `stop` begins."""
    position = stop
    while position > 0 and is_learnt[position - 1]:
        position -= 1
    return position


def _forget_span(labels: list[int], position: int) -> None:
    """Take the loss from the rest of a span that has lost its beginning."""
    while labels[position] != NO_LOSS:
        labels[position] = NO_LOSS
        position += 1


def _divide(ids: list[int], max_length: int) -> EncodedRow:
    step = max_length - 1
    starts = range(0, max(len(ids) - 1, 1), step)
    pieces = [tuple(ids[begin : begin + max_length]) for begin in starts]
    return EncodedRow(tuple(Piece(piece, piece) for piece in pieces), is_cut=len(pieces) > 1)
