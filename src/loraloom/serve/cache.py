"""Keys and values of prompts that were read before, in blocks, for those that begin alike.

Axes: L tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK_TOKENS = 16
"""Tokens of a block."""


class PrefixCache:
    """Blocks of states, the least recently used of which go first.

    A block is found by its tokens, by all tokens before them and by a salt that says whose weights
    computed the states, so that no adapter meets another's.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        """Tokens that are held."""
        return len(self._blocks) * BLOCK_TOKENS

    def find(self, salt: Hashable, tokens: Sequence[int]) -> Tensor | None:
        """Return the states of as many first tokens as are known, [layers, 2, heads, L, head_dim].

        The last token is left out in any case: reading it gives the next one's logits.
        """
        found = []
        for key, _ in _keys(salt, tokens[:-1]):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        return torch.cat(found, dim=3) if found else None

    def missing(self, salt: Hashable, tokens: Sequence[int]) -> list[tuple[bytes, int]]:
        """Return key and first token of the whole blocks that are not held."""
        return [(key, start) for key, start in _keys(salt, tokens) if key not in self._blocks]

    def put(self, key: bytes, states: Tensor) -> None:
        """Hold a block's states."""
        self._blocks[key] = states

    def shrink(self, max_tokens: int) -> None:
        """Let blocks go until there are no more than so many tokens."""
        while self._blocks and self.num_tokens > max_tokens:
            self._blocks.popitem(last=False)


def _keys(salt: Hashable, tokens: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """The key of each whole block, and its first token's place."""
    digest = hashlib.blake2b(repr(salt).encode(), digest_size=16).digest()
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = ",".join(map(str, tokens[start : start + BLOCK_TOKENS]))
        digest = hashlib.blake2b(digest + block.encode(), digest_size=16).digest()
        yield digest, start
