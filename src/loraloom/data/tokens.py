"""Text as token ids: what is given, what is scored or learned, what is cut to fit the model.

An answer is learned as the tokens that it is scored as (`encode_pairs`), and is never cut: a prompt
that is too long loses its beginning, and a row whose answer alone is too long is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from loraloom.data.sources import Fault
from loraloom.errors import DataError

# Label of a token that is read but not learned.
NO_LOSS = -100
# Tokens of a prompt that decide how the text of its completion begins.
NUM_BEFORE = 4
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
    fault: Fault | None = None
    is_empty: bool = False  # the fault is that it has no answer
    drops_tools: bool = False  # the fault is a chat template that drops tools, unlike `hermes`


DROPPED = EncodedRow(pieces=())


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode each text; the tokenizer's leading tokens come first, once."""
    if not texts:
        return []
    start = leading_tokens(tokenizer)
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [ids if ids[: len(start)] == start else [*start, *ids] for ids in encoded]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TextPair]) -> list[TokenPair]:
    """Encode context + continuation as one text, and cut its tokens where the context ends.

    Source: lm-eval 0.4.13, `TemplateLM._encode_pair`.
    """
    texts = encode_texts(tokenizer, [context + continuation for context, continuation in pairs])
    # most vocabularies have a space in the token of the word after it
    contexts = encode_texts(tokenizer, [context.rstrip() for context, _ in pairs])
    encoded: list[TokenPair] = []
    for ids, context_ids in zip(texts, contexts, strict=True):
        # a token that reaches over the cut belongs to the continuation
        cut = count_shared(ids, context_ids)
        start = ids[:cut]
        if not start:
            bos = tokenizer.bos_token_id
            start = [bos if isinstance(bos, int) else eos_token(tokenizer)]
        encoded.append(TokenPair(start, ids[cut:]))
    return encoded


def count_shared(first: Sequence[object], second: Sequence[object]) -> int:
    return sum(takewhile(bool, map(eq, first, second)))


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of every text: BOS in most Llamas, often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


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
    text = str(tokenizer.decode([token]))
    begins_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    return f" {text}" if begins_word and not text.startswith(" ") else text


def name_of_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    r"""The text of a token alone; `bytes:\\xe2` or its id where it is no whole character."""
    text = text_of_token(tokenizer, token)
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    name = str(tokenizer.convert_ids_to_tokens(token))
    if name.startswith("<0x"):
        return f"bytes:\\x{name[3:5].lower()}"
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if byte_of.keys() >= set(name):
        return "bytes:" + "".join(f"\\x{byte_of[character]:02x}" for character in name)
    return f"token_id:{token}"


def learn_completions(tokenizer: PreTrainedTokenizerBase, texts: list[TextPair]) -> list[Example]:
    """Prompts with completions in full length: loss on the completion and on an EOS after it."""
    eos = eos_token(tokenizer)
    examples: list[Example] = []
    for context, continuation in encode_pairs(tokenizer, texts):
        learned = [*continuation, eos]
        no_loss = [NO_LOSS] * len(context)
        examples.append(Example((*context, *learned), (*no_loss, *learned)))
    return examples


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, texts: list[TextPair], max_length: int
) -> list[EncodedRow]:
    start = leading_tokens(tokenizer)
    return [fit(piece, start, max_length) for piece in learn_completions(tokenizer, texts)]


def encode_completion_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[TextPair, TextPair]], max_length: int
) -> list[EncodedRow]:
    start = leading_tokens(tokenizer)
    examples = learn_completions(tokenizer, [text for pair in pairs for text in pair])
    encoded = []
    for chosen, rejected in zip(examples[::2], examples[1::2], strict=True):
        encoded.append(fit_pair(chosen, rejected, start, max_length))
    return encoded


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[EncodedRow]:
    """Plain texts with an EOS after them: loss on every token; longer texts are divided."""
    eos = eos_token(tokenizer)
    encoded: list[EncodedRow] = []
    for ids in encode_texts(tokenizer, texts):
        ended = (*ids, eos)
        pieces: list[Example] = []
        # a piece begins with the last token of the one before, so that each is predicted once
        last_start = max(len(ended) - 2, 0)  # one token alone would predict nothing
        for first in range(0, last_start + 1, max_length - 1):
            piece = ended[first : first + max_length]
            pieces.append(Example(piece, piece))
        encoded.append(EncodedRow(tuple(pieces), is_cut=len(pieces) > 1))
    return encoded


def fit(piece: Example, start: Sequence[int], max_length: int) -> EncodedRow:
    """Drop what follows the last learned span and, if it is too long, tokens behind `start`."""
    # A span that the cut goes through is not learned; a row without room for its last is dropped.
    ids, labels = piece.input_ids, piece.labels
    stop = len(labels)
    while stop and labels[stop - 1] == NO_LOSS:
        stop -= 1
    if stop == 0:
        return DROPPED
    if stop <= max_length:
        return EncodedRow((Example(ids[:stop], labels[:stop]),))
    # BOS stays in front of a row that is cut
    kept = tuple(start)
    if ids[: len(kept)] != kept:
        kept = ()
    cut = stop - max_length + len(kept)
    last_span = stop
    while last_span and labels[last_span - 1] != NO_LOSS:
        last_span -= 1
    if cut >= last_span + bool(kept):
        return DROPPED
    fitted_labels = list(labels[cut:stop])
    if cut < last_span:
        num_torn = fitted_labels.index(NO_LOSS)
        fitted_labels[:num_torn] = [NO_LOSS] * num_torn
    no_loss = [NO_LOSS] * len(kept)
    fitted = Example((*kept, *ids[cut:stop]), (*no_loss, *fitted_labels))
    return EncodedRow((fitted,), is_cut=True)


def fit_pair(chosen: Example, rejected: Example, start: list[int], max_length: int) -> EncodedRow:
    """Two answers to one prompt; if either is dropped (see `fit`), both are."""
    # both are cut by what the longer one needs, so that they keep the same part of the prompt
    num_chosen = len(chosen.input_ids)
    num_rejected = len(rejected.input_ids)
    num_excess = max(num_chosen, num_rejected) - max_length
    better = fit(chosen, start, num_chosen - num_excess)
    worse = fit(rejected, start, num_rejected - num_excess)
    if not (better.pieces and worse.pieces):
        return DROPPED
    is_cut = better.is_cut or worse.is_cut
    return EncodedRow(better.pieces + worse.pieces, is_cut=is_cut, is_pair=True)


def first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put samples into rows: each, the longest first, into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    longest_first = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    for sample in longest_first:
        for row, num_free in enumerate(room):
            if num_free >= lengths[sample]:
                rows[row].append(sample)
                room[row] -= lengths[sample]
                break
        else:
            rows.append([sample])
            room.append(max_length - lengths[sample])
    return rows


def join_samples(samples: Sequence[Example]) -> Example:
    """Put samples side by side; what follows a sample's end is not predicted from it."""
    if len(samples) == 1:
        return samples[0]
    tokens: list[int] = []
    labels: list[int] = []
    for sample in samples:
        tokens += sample.input_ids
        labels += (NO_LOSS, *sample.labels[1:])
    return Example(tuple(tokens), tuple(labels), samples[0].sample_id)
