"""Prefill and decoding as steps over a key-value cache whose rows come and go.

Axes: B rows, L tokens in the cache, V vocabulary.

Rows end at the cache's last column, so that they are padded on the left and distances between
columns are distances between tokens, whatever a row's length. A row's positions count its own
tokens. Which tokens are real is known on the CPU, so that no step asks the device for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from loraloom.models.families import keeps_running_states
from loraloom.models.forward import PreparedWeights
from loraloom.models.layout import RowAdapter

SPARE_TOKENS = 64
"""Most columns of the cache that are not in use."""


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, so that adding a token is no copy of all others."""

    def __init__(self) -> None:
        super().__init__()
        self._rooms: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add states behind those that are there, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append(0, self.keys, key_states)
        self.values = self._append(1, self.values, value_states)
        return self.keys, self.values

    def _append(self, place: int, known: Any, added: Tensor) -> Tensor:
        length = known.shape[2] if known.numel() else 0
        stop = length + added.shape[2]
        room = self._rooms[place]
        # other rows have come or gone: `known` is a tensor of its own
        is_elsewhere = room is None or not _shares_storage(known, room)
        if room is None or is_elsewhere or stop > room.shape[2]:
            room = added.new_empty(*added.shape[:2], stop + SPARE_TOKENS, added.shape[3])
            if length:
                room[:, :, :length] = known
            self._rooms[place] = room
        room[:, :, length:stop] = added
        return room[:, :, :stop]


def _shares_storage(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin in the same memory; the meta device has none, but storages."""
    storages = (tensor.untyped_storage()._cdata for tensor in (one, other))
    return len(set(storages)) == 1 and one.storage_offset() == other.storage_offset()


def make_cache(config: Any) -> DynamicCache:
    """Make a cache that keeps all tokens of every attention layer; masks see to windows.

    Layers that keep running states in place of tokens are transformers' own.

    Args:
        config: The model's.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = _RoomyLayer
    if keeps_running_states(config):
        layers = DynamicCache(config=config).layers
        cache.layers = [one if _is_running(one) else _RoomyLayer() for one in layers]
    return cache


def _is_running(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


@dataclass
class Decoding:
    """Rows that are being continued; made by `Host.prefill`.

    Args:
        adapters: Of each row.
        attention_mask: 1 at real tokens, [B, L]; on the CPU.
        logits: Of the token after each row's last one, [B, V].
        cache: Of `make_cache`: keys and values, [B, heads, L, head_dim], in each attention layer.
        prepared: The adapters' weights, as they were when the session began.
    """

    adapters: list[RowAdapter]
    attention_mask: Tensor
    cache: DynamicCache
    prepared: PreparedWeights = field(default_factory=PreparedWeights)
    logits: Tensor = field(init=False)

    @classmethod
    def resume(cls, adapter: RowAdapter, states: Tensor, prepared: PreparedWeights) -> Decoding:
        """Make a session of one row from what `states` took out of another one.

        It has no logits yet: the first `Host.extend` gives them.

        Args:
            adapter: The one that computed the states.
            states: Of the row's first tokens, [layers, 2, heads, L, head_dim].
            prepared: Takes the weights in compute form.
        """
        mask = torch.ones(1, states.shape[3], dtype=torch.long)
        session = cls([adapter], mask, make_cache(None), prepared)
        for layer, (keys, values) in enumerate(states.unsqueeze(2)):  # (2, 1, heads, L, head_dim)
            session.cache.update(keys, values, layer)
        return session

    def __len__(self) -> int:
        """Rows."""
        return len(self.adapters)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [B]; on the CPU."""
        return self.attention_mask.sum(1)

    def states(self, row: int, start: int, stop: int) -> Tensor:
        """Copy keys and values of a row's tokens, [attention layers, 2, heads, N, head_dim].

        Args:
            row: Its place.
            start: The first token, counted from the row's own first one.
            stop: The one after the last.
        """
        padding = self.attention_mask.shape[1] - int(self.attention_mask[row].sum())
        columns = slice(padding + start, padding + stop)
        return torch.stack(
            [
                torch.stack([layer.keys[row, :, columns], layer.values[row, :, columns]])
                for layer in _layers(self.cache)
                if not _is_running(layer)
            ]
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go; those that stay take this order.

        Args:
            rows: Places, at least one; one that is named twice is copied.
        """
        self.adapters = [self.adapters[row] for row in rows]
        index = torch.tensor(rows, device=self.logits.device)
        self.logits = self.logits.index_select(0, index)
        mask = self.attention_mask[list(rows)]
        unused = mask.shape[1] - int(mask.sum(1).max())
        self.attention_mask = mask[:, unused:]
        for layer in _layers(self.cache):
            for states, place in _running_states(layer):
                states[place] = states[place].index_select(0, index)
            if not _is_running(layer):
                layer.keys = layer.keys.index_select(0, index)[:, :, unused:]
                layer.values = layer.values.index_select(0, index)[:, :, unused:]

    def join(self, other: Decoding) -> None:
        """Take in the rows of another session, behind one's own; its weights are this one's.

        Args:
            other: Of the same host; it can't be used any more.
        """
        length = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        for ours, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            running = zip(_running_states(ours), _running_states(theirs), strict=True)
            for (states, place), (others, _) in running:
                states[place] = torch.cat([states[place], others[place]])
            if not _is_running(ours):
                ours.keys, ours.values = (
                    torch.cat([_pad_left(values, length, 2) for values in pair])
                    for pair in ((ours.keys, theirs.keys), (ours.values, theirs.values))
                )
        masks = (self.attention_mask, other.attention_mask)
        self.attention_mask = torch.cat([_pad_left(mask, length, 1) for mask in masks])
        self.logits = torch.cat([self.logits, other.logits])
        self.adapters += other.adapters


def _layers(cache: DynamicCache) -> Sequence[Any]:
    return cache.layers


def _running_states(layer: Any) -> list[tuple[dict[int, Any], int]]:
    """Where a layer keeps one state of all tokens of a row, [B, ...]; nowhere for attention."""
    if not _is_running(layer):
        return []
    kept = (layer.conv_states, layer.recurrent_states)
    return [(states, place) for states in kept for place in states if states[place] is not None]


def _pad_left(values: Tensor, length: int, dim: int) -> Tensor:
    missing = length - values.shape[dim]
    if missing == 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values.new_zeros(shape), values], dim=dim)
