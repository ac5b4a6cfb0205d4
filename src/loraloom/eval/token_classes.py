"""Classes of a vocabulary's tokens, by what they are in a text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TOKEN_CLASSES = ("start of a word", "rest of a word", "number", "sign", "space")

_SPACES = "Ġ▁ "
"""What tokenizers write in front of a token that begins a word."""
_CONTINUES = "##"
_BLANKS = "ĊĉĠčĩ▁"
"""White space as byte-level tokenizers write it."""


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Give the class of each token of a vocabulary, as a place in TOKEN_CLASSES, [V]."""
    ids = list(range(min(vocab_size, len(tokenizer))))
    names = map(str, tokenizer.convert_ids_to_tokens(ids))
    texts = tokenizer.batch_decode([[token_id] for token_id in ids])
    found = [TOKEN_CLASSES.index(class_of(*pair)) for pair in zip(names, texts, strict=True)]
    classes = torch.full((vocab_size,), TOKEN_CLASSES.index("sign"))
    classes[: len(ids)] = torch.tensor(found)
    return classes


def class_of(name: str, text: str) -> str:
    """Give the class of a token."""
    if not text.strip() and not name.strip(_BLANKS + " \n\t\r"):
        return "space"
    text = text.strip().removeprefix(_CONTINUES)
    if text.isdigit():
        return "number"
    if not text.isalpha():
        return "sign"
    return "start of a word" if name[0] in _SPACES else "rest of a word"
