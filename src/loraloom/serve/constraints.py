"""Tokens that keep a completion within a JSON schema.

Axes: V vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import torch
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.errors import ConfigError

_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Python's own way of writing JSON; where any space is allowed, small models never end."""


class JsonConstraints:
    """Makes constraints for a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int]):
        self._tokenizer: Any = from_tokenizer(
            tokenizer,  # pyright: ignore[reportArgumentType]
            n_vocab=max(vocab_size, len(tokenizer)),  # ids beyond the embedding are cut off
            eos_token=end_tokens,
        )

    def of_schema(self, schema: dict[str, Any]) -> JsonConstraint:
        """Make the constraint of a JSON schema."""
        try:
            text = json.dumps(schema)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=_SPACING)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema can't be used: {error}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema can't be used: {matcher.get_error()}")
        return JsonConstraint(matcher)


class JsonConstraint:
    """The tokens that may follow in one completion."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def copy(self) -> JsonConstraint:
        """Return one that is where this one is, without compiling the schema again."""
        return JsonConstraint(self._matcher.deep_copy())

    def allowed(self, num_tokens: int) -> Tensor:
        """Return which tokens may come next, [V] of booleans on the CPU."""
        biases = bytearray(self._matcher.compute_logit_bias())
        if self._matcher.is_error():
            raise ConfigError(f"the JSON schema can't be kept: {self._matcher.get_error()}")
        allowed = torch.zeros(num_tokens, dtype=torch.bool)
        known = torch.frombuffer(biases, dtype=torch.uint8)[:num_tokens].bool()
        allowed[: len(known)] = known
        return allowed

    def accept(self, token: int) -> bool:
        """Take a token; return whether the text is complete."""
        if not self._matcher.consume_token(token):
            raise ConfigError(f"the JSON schema can't be kept: {self._matcher.get_error()}")
        return self._matcher.is_stopped()
