"""How the next token is chosen.

Axes: B rows, L tokens, V vocabulary.

A row's random numbers come from the seed and the row's own key, so what is drawn for a prompt does
not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, ValidationError, field_validator
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraloom.config.faults import describe_faults
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import ConfigError
from loraloom.models.samples import sample_key

_ALL: dict[str | None, float] = {"top_k": 0, "top_p": 1.0}
"""Draw from all tokens."""


class SamplingConfig(StrictModel):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens to generate for a prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token; above it, tokens are drawn from softmax(logits / it)."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the so many most likely tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most likely tokens whose probabilities sum to this."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divide the logit of a token that was there before, in the prompt too (multiply, if < 0)."""
    num_beams: int = Field(default=1, ge=1)
    """Width of a beam search; 1 for none."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """Texts at whose first appearance a completion ends; they are not part of it."""

    @field_validator("top_k", "top_p")
    @classmethod
    def _check_drawn(cls, value: int | float, info: CheckInfo) -> int | float:
        if info.data.get("temperature") == 0 and value != _ALL[info.field_name]:
            raise ValueError(
                f"{info.field_name} has no effect at temperature 0, got {value}; "
                "set temperature above 0 or leave it out"
            )
        return value

    @field_validator("num_beams")
    @classmethod
    def _check_beams(cls, num_beams: int, info: CheckInfo) -> int:
        if num_beams > 1 and info.data.get("temperature", 0) > 0:
            raise ValueError(
                f"num_beams must be 1 when temperature is above 0, got {num_beams}; "
                "beam search draws nothing"
            )
        return num_beams

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("stop must not hold an empty text")
        return stop


def parse_sampling(**settings: Any) -> SamplingConfig:
    """Check settings of `SamplingConfig`.

    Raises:
        ConfigError: With a line for each fault.
    """
    try:
        return SamplingConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_faults(error, (SamplingConfig,)))) from error


class _RowNoise(LogitsProcessor):
    """Add Gumbel noise, so that the highest logit is a draw from the softmax.

    Each row has a generator of its own.

    Source:
        The Gumbel-max trick: argmax(logits - log(e)), e ~ Exp(1), is a draw from softmax(logits).
    """

    def __init__(self, keys: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(key) for key in keys]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the noisy logits, [B, V]."""
        draws = torch.empty_like(scores)
        for row, generator in zip(draws, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - draws.clamp_min_(torch.finfo(draws.dtype).tiny).log_()


def draw_processors(
    sampling: SamplingConfig, rows: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """Make what turns logits into logits whose highest is the token to take.

    Args:
        sampling: The settings.
        rows: A number for each row that is its own among all prompts.
        device: Of the logits.
    """
    processors = LogitsProcessorList()
    if sampling.temperature == 0:
        return processors
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    keys = [sample_key(sampling.seed, 0, row) for row in rows]
    processors.append(_RowNoise(keys, device))
    return processors
