"""Keys and values of prompts that were read before, in blocks, for those that begin alike.

Axes: L tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count, takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter
from loraloom.models.decoding import Decoding
from loraloom.models.host import Host
from loraloom.models.layout import RowAdapter, name_and_scale

BLOCK_TOKENS = 16
"""Tokens of a block."""


class PrefixCache:
    """Blocks of states, the least recently used of which go first.

    A block is found by its tokens, by all tokens before them and by a salt that says whose weights
    computed the states, so that no adapter meets another's. It is used later than all that go on
    from it, so that a block is never held without those before it.
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
        keys = [key for key, _ in _keys(salt, tokens[:-1])]
        found = list(takewhile(self._blocks.__contains__, keys))
        self._use(found)
        return torch.cat([self._blocks[key] for key in found], dim=3) if found else None

    def remember(
        self, session: Decoding, place: int, salt: Hashable, tokens: Sequence[int]
    ) -> None:
        """Hold the states of a row's whole blocks that are not held."""
        starts = dict(_keys(salt, tokens))
        missing = [key for key in starts if key not in self._blocks]
        if not missing:
            return
        states = session.states(place, starts[missing[0]], starts[missing[-1]] + BLOCK_TOKENS)
        for key, block in zip(missing, states.split(BLOCK_TOKENS, dim=3), strict=True):
            self._blocks[key] = block.clone()
        self._use([*starts])

    def shrink(self, max_tokens: int) -> None:
        """Let blocks go until at most `max_tokens` are held."""
        while self._blocks and self.num_tokens > max_tokens:
            self._blocks.popitem(last=False)

    def _use(self, keys: Sequence[bytes]) -> None:
        """Note that a prompt's first blocks were used, the first one last."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


class Salts:
    """Tells adapters' weights from all others, as they are now."""

    def __init__(self, host: Host, on_change: Callable[[Adapter], object]):
        self._host = host
        self._on_change = on_change
        self._serials: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()
        self._next_serial = count()
        self._versions: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()

    def of(self, row_adapter: RowAdapter) -> Hashable:
        """Return what a row's adapter is told by, scale included."""
        name, scale = name_and_scale(row_adapter)
        if name is None:
            return None
        adapter = self._host.adapter(name)
        version = sum(parameter._version for parameter in adapter.parameters())
        if self._versions.setdefault(adapter, version) != version:
            self._versions[adapter] = version
            self._on_change(adapter)
        if adapter not in self._serials:
            self._serials[adapter] = next(self._next_serial)
        return self._serials[adapter], version, scale


def _keys(salt: Hashable, tokens: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    """The key of each whole block, and its first token's place."""
    digest = hashlib.blake2b(repr(salt).encode(), digest_size=16).digest()
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        block = ",".join(map(str, tokens[start : start + BLOCK_TOKENS]))
        digest = hashlib.blake2b(digest + block.encode(), digest_size=16).digest()
        yield digest, start
