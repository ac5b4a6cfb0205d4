"""Text as token ids: what is given, what is scored or learned, what is cut to fit the model.

An answer is learned as the tokens that it is scored as (`encode_pairs`), and is never cut: a prompt
that is too long loses its beginning, and a row whose answer alone is too long is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from loraloom.errors import DataError

# Label of a token that is read but not learned.
NO_LOSS = -100
# Tokens of a prompt that decide how the text of its completion begins.
NUM_BEFORE = 4
# Characters by which byte-level vocabularies write bytes: printable ones by themselves.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + number): byte for number, byte in enumerate(_OTHERS)}
# A context and what follows it: a prompt, say, and its completion.
TextPair = tuple[str, str]


@dataclass(frozen=True)
class Example:
    """A tokenized text: a label is its token or NO_LOSS; the trainer shifts by one."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    sample_id: int = 0  # the same in every epoch, whatever the order
    expert_group: int = 0  # its source's
    # What an objective reads besides log p, by name: an advantage, or a value for each label.
    extras: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict, hash=False)

    @property
    def rows(self) -> tuple[Example, ...]:
        return (self,)

    @property
    def is_learnt(self) -> list[bool]:
        """Whether each token is predicted, with a loss; the first has nothing before it."""
        return [False, *(label != NO_LOSS for label in self.labels[1:])]


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a better answer, and with a worse one: each a row and a sample of its own."""

    chosen: Example
    rejected: Example

    @property
    def rows(self) -> tuple[Example, ...]:
        return (self.chosen, self.rejected)


TrainingExample = Example | PreferencePair


def count_labels(example: Example) -> int:
    return sum(example.is_learnt)


class TokenPair(NamedTuple):
    """The tokens of a context and of what follows it."""

    context: list[int]
    continuation: list[int]


class EncodedRow(NamedTuple):
    """What became of a row: no piece if it was dropped, several of a long text or a preference."""

    pieces: tuple[Example, ...]
    is_cut: bool = False
    is_pair: bool = False
    fault: str = ""  # why the row can't be used
    is_empty: bool = False  # the fault is that it has no answer


DROPPED = EncodedRow(pieces=())


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text after the tokens that the tokenizer puts in front, if not there."""
    if not texts:
        return []
    start = leading_tokens(tokenizer)
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [ids if ids[: len(start)] == start else [*start, *ids] for ids in encoded]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TextPair]) -> list[TokenPair]:
    """Encode each context with its continuation as one text, as lm-eval 0.4.13, and cut between."""
    # most vocabularies have a space in the token of the word after it
    moved = [
        (kept := context.rstrip(), context[len(kept) :] + continuation)
        for context, continuation in pairs
    ]
    texts = encode_texts(tokenizer, [context + continuation for context, continuation in moved])
    contexts = encode_texts(tokenizer, [context for context, _ in moved])
    # a token that reaches over the cut belongs to the continuation
    cuts = [count_shared(*both) for both in zip(texts, contexts, strict=True)]
    bos = tokenizer.bos_token_id
    return [
        TokenPair(ids[:cut] or [bos if isinstance(bos, int) else eos_token(tokenizer)], ids[cut:])
        for ids, cut in zip(texts, cuts, strict=True)
    ]


def count_shared(first: Sequence[object], second: Sequence[object]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of every text: BOS in most Llamas, often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return next((full[:n] for n in starts if full[n : n + len(bare)] == bare), [])


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError("the tokenizer must have an EOS token to end a text; set its eos_token")
    return end


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with, which nothing reads: EOS where the tokenizer has none for it."""
    pad = tokenizer.pad_token_id
    return pad if isinstance(pad, int) else eos_token(tokenizer)


def text_of_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token alone, with the space that SentencePiece's decoders leave out."""
    text, name = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if name.startswith("\u2581") and not text.startswith(" ") else text


def name_of_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    r"""The text of a token alone; `bytes:\\xe2` or its id where it is no whole character."""
    text, name = text_of_token(tokenizer, token), str(tokenizer.convert_ids_to_tokens(token))
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    if name.startswith("<0x"):
        return f"bytes:\\x{name[3:5].lower()}"
    if all(character in _BYTES for character in name):
        return "bytes:" + "".join(f"\\x{_BYTES[character]:02x}" for character in name)
    return f"token_id:{token}"


def learn_completions(tokenizer: PreTrainedTokenizerBase, texts: list[TextPair]) -> list[Example]:
    """Prompts with completions in full length: loss on the completion and on an EOS after it."""
    end = eos_token(tokenizer)
    return [
        Example((*context, *continuation, end), (*[NO_LOSS] * len(context), *continuation, end))
        for context, continuation in encode_pairs(tokenizer, texts)
    ]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, texts: list[TextPair], max_length: int
) -> list[EncodedRow]:
    start = leading_tokens(tokenizer)
    return [fit(piece, start, max_length) for piece in learn_completions(tokenizer, texts)]


def encode_completion_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[TextPair, TextPair]], max_length: int
) -> list[EncodedRow]:
    start = leading_tokens(tokenizer)
    learnt = learn_completions(tokenizer, [text for pair in pairs for text in pair])
    both = zip(learnt[::2], learnt[1::2], strict=True)
    return [fit_pair(*answers, start, max_length) for answers in both]


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[EncodedRow]:
    """Plain texts with an EOS after them: loss on every token; longer texts are divided."""
    end, encoded = eos_token(tokenizer), []
    for ids in encode_texts(tokenizer, texts):
        # a piece begins with the last token of the one before, so that each is predicted once
        starts = range(0, max(len(ids), 1), max_length - 1)
        ended = (*ids, end)
        parts = [ended[start : start + max_length] for start in starts]
        pieces = tuple(Example(part, part) for part in parts)
        encoded.append(EncodedRow(pieces, is_cut=len(pieces) > 1))
    return encoded


def fit(piece: Example, start: Sequence[int], max_length: int) -> EncodedRow:
    """Cut a row from the left, but for `start`, and after the last span of what is learned."""
    # A span that the cut goes through is not learned; a row without room for its last is dropped.
    ids, labels = piece.input_ids, piece.labels
    stop = next((n for n in range(len(labels), 0, -1) if labels[n - 1] != NO_LOSS), 0)
    if stop == 0:
        return DROPPED
    if stop <= max_length:
        return EncodedRow((Example(ids[:stop], labels[:stop]),))
    # BOS stays in front of a row that is cut
    kept = tuple(start) if ids[: len(start)] == tuple(start) else ()
    cut = stop - max_length + len(kept)
    last_span = next((n for n in range(stop, 0, -1) if labels[n - 1] == NO_LOSS), 0)
    if cut >= last_span + bool(kept):
        return DROPPED
    rest = list(labels[cut:stop])
    if cut < last_span:
        rest[: rest.index(NO_LOSS)] = [NO_LOSS] * rest.index(NO_LOSS)
    fitted = Example((*kept, *ids[cut:stop]), (*[NO_LOSS] * len(kept), *rest))
    return EncodedRow((fitted,), is_cut=True)


def fit_pair(chosen: Example, rejected: Example, start: list[int], max_length: int) -> EncodedRow:
    """Two answers to one prompt; if either is dropped (see `fit`), both are."""
    # both are cut by what the longer one needs, so that they keep the same part of the prompt
    longest = max(len(chosen.input_ids), len(rejected.input_ids))
    fitted = [
        fit(answer, start, max_length - (longest - len(answer.input_ids)))
        for answer in (chosen, rejected)
    ]
    if not all(row.pieces for row in fitted):
        return DROPPED
    pieces = tuple(piece for row in fitted for piece in row.pieces)
    return EncodedRow(pieces, is_cut=any(row.is_cut for row in fitted), is_pair=True)


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put samples into rows: each, the longest first, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        row = next((row for row, left in enumerate(room) if left >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows


def join_samples(samples: Sequence[Example]) -> Example:
    """Put samples side by side; what follows a sample's end is not predicted from it."""
    if len(samples) == 1:
        return samples[0]
    labels = chain.from_iterable((NO_LOSS, *sample.labels[1:]) for sample in samples)
    tokens = chain.from_iterable(sample.input_ids for sample in samples)
    return Example(tuple(tokens), tuple(labels), samples[0].sample_id)


def group_by_length(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[int]:
    """Sort within mega-batches, as transformers 5.24, `trainer_pt_utils` (the longest first)."""
    size = max(min(len(order) // (batch_size * 4), 50), 1) * batch_size
    places = [
        sorted(range(start, min(start + size, len(order))), key=lambda place: -lengths[place])
        for start in range(0, len(order), size)
    ]
    # the longest example of all comes first, so that memory runs out early if it does
    longest = max(range(len(places)), key=lambda part: lengths[places[part][0]])
    places[0][0], places[longest][0] = places[longest][0], places[0][0]
    return [order[place] for part in places for place in part]
