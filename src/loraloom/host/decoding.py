"""Prefill and decoding as steps over a key-value cache whose rows come and go.

Axes: B rows, L tokens in the cache, V vocabulary.

Rows end at the cache's last column, so that they are padded on the left and distances between
columns are distances between tokens, whatever a row's length. A row's positions count its own
tokens. Which tokens are real is known on the CPU, so that no step asks the device for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from loraloom.base.structure import keeps_running_states, text_config
from loraloom.errors import DataError
from loraloom.host.forwards import ForwardRequest, Forwards
from loraloom.host.heads import Heads
from loraloom.host.layout import RowAdapter, RowAdapters
from loraloom.host.prepared_weights import PreparedWeights, Record

# Columns behind the last token, for those that follow, when room for them is made.
SPARE_TOKENS = 64


class _Room:
    """Keys, or values, of one layer, [B, heads, L, head_dim], with room for tokens behind them.

    A step that adds a token copies nothing; where rows come or go, all of them are copied.
    """

    def __init__(self, like: Tensor):
        self._space = like[:, :, :0]
        self._length = 0

    @property
    def window(self) -> Tensor:
        return self._space[:, :, : self._length]

    def append(self, added: Tensor) -> None:
        start = self._length
        stop = start + added.shape[2]
        if stop > self._space.shape[2]:
            self._space = pad(self.window, (0, 0, 0, added.shape[2] + SPARE_TOKENS))
        self._space[:, :, start:stop] = added
        self._length = stop

    def join(self, other: _Room) -> None:
        length = max(self._length, other._length)
        spaces = []
        for room in (self, other):
            padding = length - room._length
            spaces.append(pad(room.window, (0, 0, padding, SPARE_TOKENS)))
        self._space = torch.cat(spaces)
        self._length = length

    def keep(self, rows: Tensor, unused: int) -> None:
        """Keep these rows in this order, without the first columns, which none of them uses."""
        self._space = self._space[:, :, unused:].index_select(0, rows)
        self._length -= unused


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._rooms = _Room(key_states), _Room(value_states)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room.append(states)
        return self._show()

    def join(self, other: _RoomyLayer) -> None:
        for ours, theirs in zip(self._rooms, other._rooms, strict=True):
            ours.join(theirs)
        self._show()

    def keep(self, rows: Tensor, unused: int) -> None:
        for room in self._rooms:
            room.keep(rows, unused)
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room.window for room in self._rooms)
        return self.keys, self.values


def make_cache(config: Any) -> DynamicCache:
    """Make a cache that keeps all tokens of every attention layer; masks see to windows."""
    # Layers that keep running states in place of tokens are transformers' own.
    cache = DynamicCache()
    cache.layer_class_to_replicate = _RoomyLayer
    if keeps_running_states(config):
        layers = DynamicCache(config=config).layers
        cache.layers = [layer if _is_running(layer) else _RoomyLayer() for layer in layers]
    return cache


def _is_running(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


@dataclass(frozen=True)
class TokenStates:
    """Keys and values of some tokens of a row, of all attention layers."""

    values: Tensor  # side by side, [N, features of all]
    shapes: Sequence[tuple[int, int]]  # heads and head_dim of a layer's keys, and of its values

    @staticmethod
    def join(parts: Sequence[TokenStates]) -> TokenStates:
        return replace(parts[0], values=torch.cat([part.values for part in parts]))

    def split(self, num_tokens: int) -> list[TokenStates]:
        """Copy the states of so many tokens each."""
        parts = self.values.split(num_tokens)
        return [replace(self, values=part.clone()) for part in parts]

    def by_layer(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values of each layer, [1, heads, N, head_dim]."""
        widths = [heads * head_dim for heads, head_dim in self.shapes]
        columns = self.values.split(widths, dim=1)
        states = [
            values.unflatten(1, shape).transpose(0, 1).unsqueeze(0)
            for values, shape in zip(columns, self.shapes, strict=True)
        ]
        yield from zip(states[0::2], states[1::2], strict=True)


@dataclass
class Decoding:
    """Rows that are being continued; made by `Host.prefill`. Weights must not change meanwhile."""

    adapters: list[RowAdapter]
    attention_mask: Tensor  # 1 at real tokens, [B, L]; on the CPU
    cache: Any  # of make_cache: keys and values, [B, heads, L, head_dim], in attention layers
    prepared: PreparedWeights = field(default_factory=PreparedWeights)
    logits: Tensor = field(init=False)  # of the token after each row's last one, [B, V]
    hidden_states: Tensor = field(init=False)  # of the tokens that were read last, [B, L, D]

    @classmethod
    def resume(
        cls, adapter: RowAdapter, states: TokenStates, prepared: PreparedWeights
    ) -> Decoding:
        """Make a session of one row, without logits, from what `states` took out of another."""
        mask = torch.ones(1, len(states.values), dtype=torch.long)
        session = cls([adapter], mask, make_cache(None), prepared)
        for layer, (keys, values) in enumerate(states.by_layer()):
            session.cache.update(keys, values, layer)
        return session

    def states(self, row: int, start: int, stop: int) -> TokenStates:
        """Copy keys and values of a row's tokens, in attention layers."""
        padding = self.attention_mask.shape[1] - int(self.attention_mask[row].sum())
        columns = slice(padding + start, padding + stop)
        by_token = []
        shapes = []
        for layer in self.cache.layers:
            if not _is_running(layer):
                for room in (layer.keys, layer.values):
                    states = room[row, :, columns].transpose(0, 1)  # (N, heads, head_dim)
                    by_token.append(states.flatten(1))
                    shapes.append((states.shape[1], states.shape[2]))
        return TokenStates(torch.cat(by_token, dim=1), shapes)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; those that stay take this order."""
        self.adapters = [self.adapters[row] for row in rows]
        index = torch.tensor(rows, device=self.logits.device)
        self.logits = self.logits.index_select(0, index)
        mask = self.attention_mask[list(rows)]
        unused = mask.shape[1] - int(mask.sum(1).max())
        self.attention_mask = mask[:, unused:]
        for layer in self.cache.layers:
            for states, key in _running_states(layer):
                states[key] = states[key].index_select(0, index)
            if not _is_running(layer):
                layer.keep(index, unused)

    def join(self, other: Decoding) -> None:
        """Add the rows of another session behind one's own; its weights are this one's."""
        masks = []
        length = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        for mask in (self.attention_mask, other.attention_mask):
            masks.append(pad(mask, (length - mask.shape[1], 0)))
        self.attention_mask = torch.cat(masks)
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            running = zip(_running_states(ours), _running_states(theirs), strict=True)
            for (states, key), (added, _) in running:
                states[key] = torch.cat([states[key], added[key]])
            if not _is_running(ours):
                ours.join(theirs)
        self.logits = torch.cat([self.logits, other.logits])
        self.adapters += other.adapters


class Sessions:
    """Starts and extends the decoding sessions of a base model."""

    def __init__(self, forwards: Forwards, heads: Heads):
        self._forwards = forwards
        self._heads = heads

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        adapters: RowAdapters,
        prepared: PreparedWeights | None,
        record: Record | None,
    ) -> Decoding:
        if attention_mask is None:
            mask = torch.ones(input_ids.shape, dtype=torch.long)
        else:
            mask = attention_mask.cpu()
        steps = mask.long().diff(dim=1)
        if (steps < 0).any() or not mask[:, -1].all():
            raise DataError(
                "prompts must be padded on the left, so that all of them end at the last column; "
                "got an attention_mask with 0 behind 1"
            )
        request = ForwardRequest(input_ids=input_ids, adapters=adapters, mask=mask)
        session = Decoding(
            adapters=self._forwards.choose_adapters(request),
            attention_mask=mask[:, :0],
            cache=make_cache(text_config(self._forwards.model)),
            prepared=prepared or PreparedWeights(),
        )
        self.extend(session, input_ids, record, mask)
        return session

    @torch.no_grad()
    def extend(
        self,
        session: Decoding,
        input_ids: Tensor,
        record: Record | None,
        added_mask: Tensor | None = None,
    ) -> Tensor:
        """Append tokens to each row of a session, [B, L]; return the next logits, [B, V]."""
        device = self._forwards.device
        if added_mask is None:
            added_mask = session.attention_mask.new_ones(input_ids.shape)
        mask = torch.cat([session.attention_mask, added_mask], dim=1)
        length = input_ids.shape[1]
        positions = mask.cumsum(1).sub(1).clamp_min(0)[:, -length:]
        # A mask of ones is left out, as transformers would ask the device for it, and then do so.
        has_padding = not mask.all()
        positions_and_mask = torch.cat([positions, mask], dim=1) if has_padding else positions
        positions_and_mask = positions_and_mask.to(device)  # at once, as each copy waits
        request = ForwardRequest(
            input_ids=input_ids,
            adapters=session.adapters,
            mask=mask,
            model_inputs={
                "position_ids": positions_and_mask[:, :length],
                self._forwards.cache_argument: session.cache,
                "use_cache": True,
            },
            record=record,
        )
        model_mask = positions_and_mask[:, length:] if has_padding else None
        with self._forwards.thread.using(session.prepared):
            with self._forwards.run(request) as (_, inputs):
                out = self._forwards.run_decoder(
                    input_ids=input_ids, attention_mask=model_mask, **inputs
                )
            last_states = out.last_hidden_state[:, -1].contiguous()
            session.logits = self._heads.logits(last_states, session.adapters)
        session.attention_mask = mask
        session.hidden_states = out.last_hidden_state
        return session.logits


def _running_states(layer: Any) -> list[tuple[dict[int, Any], int]]:
    """Where a layer keeps one state of all tokens of a row, [B, ...]; nowhere for attention."""
    if not _is_running(layer):
        return []
    kept = []
    for states in (layer.conv_states, layer.recurrent_states):
        for key, value in states.items():
            if value is not None:
                kept.append((states, key))
    return kept
