"""How the next token is chosen, and which tokens end a completion.

Axes: V vocabulary.

A row's random numbers come from the seed and the row's own key, so what is drawn for a prompt does
not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraloom.config.faults import checked
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import shown
from loraloom.generation.prompts import is_unicode
from loraloom.models.host import Host
from loraloom.ops.dropout import sample_key

_ALL: dict[str | None, float] = {"top_k": 0, "top_p": 1.0}
"""Draw from all tokens."""


MIN_TEMPERATURE = 0.001
MAX_STOP = 10_000
"""Characters of a stop text."""


class SamplingConfig(StrictModel):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens to generate for a prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; from 0.001, tokens are drawn from softmax(logits / it)."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many of the most likely tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most likely tokens whose probabilities sum to this."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divide the logit of a token that was there before, in the prompt too (multiply, if < 0)."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random draws."""
    stop: tuple[str, ...] = ()
    """Texts at whose first appearance a completion ends; they are not part of it."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, temperature: float) -> float:
        if 0 < temperature < MIN_TEMPERATURE:  # logits by less are infinite
            raise ValueError(
                f"temperature must be 0, for the most likely token, or at least {MIN_TEMPERATURE}, "
                f"got {temperature}"
            )
        return temperature

    @field_validator("top_k", "top_p")
    @classmethod
    def _check_drawn(cls, value: int | float, info: CheckInfo) -> int | float:
        if info.data.get("temperature") == 0 and value != _ALL[info.field_name]:
            raise ValueError(
                f"{info.field_name} has no effect at temperature 0, got {value}; "
                "set temperature above 0 or leave it out"
            )
        return value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("stop must not hold an empty text")
        for text in stop:
            if len(text) > MAX_STOP or not is_unicode(text):
                raise ValueError(
                    f"stop must hold texts of at most {MAX_STOP} characters of Unicode, got "
                    f"{shown(text)}"
                )
        return stop


def parse_sampling(**settings: Any) -> SamplingConfig:
    """Check settings of `SamplingConfig`."""
    return checked(SamplingConfig, settings)


class TokenChooser:
    """Chooses the tokens of one row, whose draws follow from the seed and the row's number."""

    def __init__(self, sampling: SamplingConfig, row: int, device: torch.device):
        self._processors = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.temperature == 0:
            return
        self._processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._processors.append(TopPLogitsWarper(sampling.top_p))
        key = sample_key(sampling.seed, 0, row)
        self._generator = torch.Generator(device).manual_seed(key)

    def choose(self, input_ids: Sequence[int], logits: Tensor) -> int:
        """Choose the token after `input_ids` by its logits, [V].

        Source:
            The Gumbel-max trick: argmax(logits - log(e)), e ~ Exp(1), is a draw from
            softmax(logits).
        """
        said = torch.tensor([input_ids], dtype=torch.long, device=logits.device)
        scores = self._processors(said, logits.float().unsqueeze(0))  # pyright: ignore[reportArgumentType]
        if self._generator is not None:
            draws = torch.empty_like(scores).exponential_(generator=self._generator)
            scores = scores - draws.clamp_min_(torch.finfo(draws.dtype).tiny).log_()
        return int(scores.argmax())


def end_tokens(host: Host, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: those of the model's generation config, and EOS."""
    configured = host.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})
