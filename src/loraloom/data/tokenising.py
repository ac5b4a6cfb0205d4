"""Text to token ids, cut into what is given and what is scored or learnt.

Training and evaluation both use `encode_pairs`: an answer is learnt as the tokens that it is scored
as.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from loraloom.errors import DataError

_WORD_START = "\u2581"
"""What SentencePiece writes in front of a token that begins a word."""


class TokenPair(NamedTuple):
    """The tokens of a context and of what follows it."""

    context: list[int]
    continuation: list[int]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[TokenPair]:
    """Encode each context with its continuation as one text and cut the tokens between them.

    Whitespace at the end of the context goes to the continuation, as most vocabularies have it in
    the token of the next word. A token that reaches over the cut belongs to the continuation, so
    both together are the tokens of the whole text. In place of an empty context stands the token
    that begins a text: BOS, or EOS where there is none.

    Source:
        lm-eval 0.4.13 `lm_eval/api/model.py`, `_encode_pair`: the same cut, except where a token
        reaches over it.
    """
    moved = [move_trailing_space(context, continuation) for context, continuation in pairs]
    wholes = encode_texts(tokenizer, [context + continuation for context, continuation in moved])
    contexts = encode_texts(tokenizer, [context for context, _ in moved])
    cuts = [_cut(whole, context) for whole, context in zip(wholes, contexts, strict=True)]
    return [
        pair if pair.context else TokenPair([start_of_text(tokenizer)], pair.continuation)
        for pair in cuts
    ]


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], start: list[int] | None = None
) -> list[list[int]]:
    """Token ids of each text after the tokens that the tokenizer puts in front, but never an EOS.

    A text that begins with those tokens already gets them once.
    """
    if not texts:
        return []
    start = leading_tokens(tokenizer) if start is None else start
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return [ids if ids[: len(start)] == start else [*start, *ids] for ids in encoded]


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts in front of every text: BOS in most Llamas, often none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for count in range(len(full) - len(bare) + 1):
        if full[count : count + len(bare)] == bare:
            return full[:count]
    return []


NUM_BEFORE = 4
"""Tokens of a prompt that tell how its completion's text begins."""


def text_after(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]
) -> str:
    """The text of tokens, without special ones, that go on from others.

    A decoder of SentencePiece leaves out the space that a text begins with, but not where something
    stands before it.
    """
    known = str(tokenizer.decode([*before], skip_special_tokens=True))
    whole = str(tokenizer.decode([*before, *ids], skip_special_tokens=True))
    return whole[len(known.rstrip("\N{REPLACEMENT CHARACTER}")) :]


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a text."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            f"the tokenizer must have an EOS token to end a text with, got {end}; "
            "set tokenizer.eos_token"
        )
    return end


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that begins a text: BOS, or EOS where there is none."""
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) else eos_token(tokenizer)


def text_of_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of a token alone, with the space that SentencePiece's decoders leave out."""
    text, name = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if name.startswith(_WORD_START) and not text.startswith(" ") else text


def move_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    """Give the whitespace at the end of a context to its continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def count_shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the entries that two sequences begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _cut(whole: list[int], context: list[int]) -> TokenPair:
    shared = count_shared(whole, context)
    return TokenPair(whole[:shared], whole[shared:])
