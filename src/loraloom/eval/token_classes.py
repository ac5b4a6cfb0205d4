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
    """Give the class of each token of a vocabulary, as a place in TOKEN_CLASSES, [V].

    Args:
        tokenizer: Names the tokens.
        vocab_size: V of the model, which may be more than the tokenizer has.
    """
    names = tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))
    classes = torch.full((vocab_size,), TOKEN_CLASSES.index("sign"))
    classes[: len(names)] = torch.tensor([TOKEN_CLASSES.index(class_of(str(n))) for n in names])
    return classes


def class_of(name: str) -> str:
    """Give the class of a token by its name in the vocabulary: `Ġthe`, `▁the` or `##ing`."""
    if not name.strip(_BLANKS + " \n\t\r"):
        return "space"
    text = name.lstrip(_SPACES).removeprefix(_CONTINUES)
    if text.isdigit():
        return "number"
    if not text.isalpha():
        return "sign"
    return "start of a word" if name[0] in _SPACES else "rest of a word"
