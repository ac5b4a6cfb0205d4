"""Which states of prompts are kept."""

from __future__ import annotations

import random
from unittest.mock import create_autospec

import torch

from loraloom.generation.runner import BLOCK_TOKENS, PrefixCache
from loraloom.models.decoding import Decoding


def states(tokens: list[int]) -> torch.Tensor:
    """States that tell the tokens, [layers, 2, heads, L, head_dim]."""
    return torch.tensor(tokens).view(1, 1, 1, -1, 1)


def remember(cache: PrefixCache, tokens: list[int]) -> None:
    session = create_autospec(Decoding, instance=True)
    session.states.side_effect = lambda place, start, stop: states(tokens[start:stop])
    cache.remember(session, 0, None, tokens)


def found(cache: PrefixCache, tokens: list[int]) -> list[int]:
    held = cache.find(None, tokens)
    return [] if held is None else held.flatten().tolist()


def test_a_full_cache_lets_the_ends_of_prompts_go_first():
    cache, prompt = PrefixCache(), list(range(4 * BLOCK_TOKENS + 1))
    remember(cache, prompt)
    cache.shrink(2 * BLOCK_TOKENS)
    assert found(cache, prompt) == prompt[: 2 * BLOCK_TOKENS]


def test_prompts_that_begin_alike_are_kept_in_a_cache_that_overflows():
    generator, cache = random.Random(0), PrefixCache()
    for _ in range(300):
        branches = [generator.randrange(2) for _ in range(generator.randrange(1, 6))]
        prompt = [branch for branch in branches for _ in range(BLOCK_TOKENS)]
        held = found(cache, [*prompt, 7])
        assert held == prompt[: len(held)]
        if generator.random() < 0.7:
            remember(cache, prompt)
            assert found(cache, [*prompt, 7]) == prompt
        cache.shrink(generator.randrange(3, 9) * BLOCK_TOKENS)
