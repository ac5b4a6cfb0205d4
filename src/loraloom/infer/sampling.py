"""How the next token is chosen, and which texts end a completion.

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
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loraloom.config.faults import describe_faults
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import ConfigError, shown
from loraloom.infer.prompts import is_unicode
from loraloom.ops.dropout import sample_key

_ALL: dict[str | None, float] = {"top_k": 0, "top_p": 1.0}
"""Draw from all tokens."""


MIN_TEMPERATURE = 0.001
MAX_BEAMS = 256
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
    num_beams: int = Field(default=1, ge=1, le=MAX_BEAMS)
    """Width of a beam search; 1 for none."""
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
        for text in stop:
            if len(text) > MAX_STOP or not is_unicode(text):
                raise ValueError(
                    f"stop must hold texts of at most {MAX_STOP} characters of Unicode, got "
                    f"{shown(text)}"
                )
        return stop


def parse_sampling(**settings: Any) -> SamplingConfig:
    """Check settings of `SamplingConfig`."""
    try:
        return SamplingConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_faults(error, (SamplingConfig,)))) from error


class TokenChooser:
    """Chooses each row's next token."""

    def __init__(self, sampling: SamplingConfig, rows: Sequence[int], device: torch.device):
        self._processors = LogitsProcessorList()
        self._generators: list[torch.Generator] | None = None
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.temperature == 0:
            return
        self._processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k > 0:
            self._processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._processors.append(TopPLogitsWarper(sampling.top_p))
        keys = [sample_key(sampling.seed, 0, row) for row in rows]
        self._generators = [torch.Generator(device).manual_seed(key) for key in keys]

    def choose(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Choose tokens, [B]."""
        scores = self._processors(input_ids, logits.float())  # pyright: ignore[reportArgumentType]
        if self._generators is not None:
            scores = _add_noise(scores, self._generators)
        return scores.argmax(-1)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go."""
        if self._generators is not None:
            self._generators = [self._generators[row] for row in rows]


def _add_noise(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Add Gumbel noise, so that the highest score is a draw from the softmax.

    Source:
        The Gumbel-max trick: argmax(logits - log(e)), e ~ Exp(1), is a draw from softmax(logits).
    """
    draws = torch.empty_like(scores)
    for row, generator in zip(draws, generators, strict=True):
        row.exponential_(generator=generator)
    return scores - draws.clamp_min_(torch.finfo(draws.dtype).tiny).log_()


class StopTexts(StoppingCriteria):
    """Ends a row once one of the texts is in what was generated.

    Unlike transformers' `stop_strings` it reads no token of the prompt, so that a stop text doesn't
    end a completion by what it began in the prompt.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_length: int
    ):
        self.tokenizer = tokenizer
        self.texts = texts
        self.prompt_length = prompt_length
        # a token has a byte at least, so a text that ends now began within so many tokens; and one
        # stands in front, as decoders leave out a first space
        self.window = 1 + max(len(text.encode()) for text in texts)

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
