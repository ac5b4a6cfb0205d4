"""Texts at which a completion ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopTexts(StoppingCriteria):
    """Ends a row once one of the texts is in what was generated.

    Unlike transformers' `stop_strings` it reads no token of the prompt, so that a stop text doesn't
    end a completion by what it began in the prompt.

    Args:
        tokenizer: Of the model.
        texts: Any of them ends a row; none is empty.
        prompt_length: In tokens, padding included.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_length: int
    ):
        self.tokenizer = tokenizer
        self.texts = texts
        self.prompt_length = prompt_length
        # a token has a byte at least, so a text that ends now began within so many tokens
        self.window = max(len(text.encode()) for text in texts)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any
    ) -> Tensor:
        """Return whether each row of [B, L] has ended, [B]."""
        start = max(self.prompt_length, input_ids.shape[1] - self.window)
        tails = self.tokenizer.batch_decode(input_ids[:, start:])
        ended = [any(text in tail for text in self.texts) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return what comes before the first of the stop texts."""
    cuts = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(cuts, default=len(text))]
