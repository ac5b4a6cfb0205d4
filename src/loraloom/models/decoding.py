"""Prefill and decoding as steps over a key-value cache whose rows come and go.

Axes: B rows, L tokens in the cache, V vocabulary.

Rows end at the cache's last column, so that they are padded on the left and distances between
columns are distances between tokens, whatever a row's length. A row's positions count its own
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from loraloom.models.forward import PreparedWeights
from loraloom.models.layout import RowAdapter

if TYPE_CHECKING:
    from loraloom.models.host import Host


@dataclass
class Decoding:
    """Rows that are being continued; made by `Host.prefill`.

    Args:
        host: Whose rows these are.
        adapters: Of each row.
        cache: Keys and values, [B, heads, L, head_dim] in each layer.
        attention_mask: 1 at real tokens, [B, L].
        logits: Of the token after each row's last one, [B, V].
        prepared: The adapters' weights, as they were when the session began.
    """

    host: Host
    adapters: list[RowAdapter]
    cache: DynamicCache
    attention_mask: Tensor
    logits: Tensor
    prepared: PreparedWeights = field(default_factory=PreparedWeights)

    def __len__(self) -> int:
        """Rows."""
        return len(self.adapters)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [B]."""
        return self.attention_mask.sum(1)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go; those that stay take this order.

        Args:
            rows: Places, at least one; one that is named twice is copied.
        """
        index = torch.tensor(rows, device=self.attention_mask.device)
        self.adapters = [self.adapters[row] for row in rows]
        self.logits = self.logits.index_select(0, index)
        mask = self.attention_mask.index_select(0, index)
        unused = mask.shape[1] - int(mask.sum(1).max())
        self.attention_mask = mask[:, unused:]
        for layer in _layers(self.cache):
            layer.keys = layer.keys.index_select(0, index)[:, :, unused:]
            layer.values = layer.values.index_select(0, index)[:, :, unused:]

    def join(self, other: Decoding) -> None:
        """Take in the rows of another session, behind one's own; its weights are this one's.

        Args:
            other: Of the same host; it can't be used any more.
        """
        length = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        for ours, theirs in zip(_layers(self.cache), _layers(other.cache), strict=True):
            ours.keys, ours.values = (
                torch.cat([_pad_left(values, length, 2) for values in pair])
                for pair in ((ours.keys, theirs.keys), (ours.values, theirs.values))
            )
        masks = (self.attention_mask, other.attention_mask)
        self.attention_mask = torch.cat([_pad_left(mask, length, 1) for mask in masks])
        self.logits = torch.cat([self.logits, other.logits])
        self.adapters += other.adapters


@torch.no_grad()
def prefill(
    host: Host,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    adapters: Sequence[RowAdapter] | None = None,
) -> Decoding:
    """Read prompts; see `Host.prefill`."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    names: list[RowAdapter] = [None] * len(input_ids) if adapters is None else list(adapters)
    # Without the model's config the cache keeps all tokens in each layer; masks see to windows.
    session = Decoding(host, names, DynamicCache(), mask, input_ids.new_empty(0))
    session.logits = _advance(session, input_ids, mask.cumsum(1).sub(1).clamp_min(0))
    return session


@torch.no_grad()
def decode(session: Decoding, tokens: Tensor) -> Tensor:
    """Continue every row by a token; see `Host.decode`."""
    positions = session.lengths.unsqueeze(1)
    ones = session.attention_mask.new_ones(len(session), 1)
    session.attention_mask = torch.cat([session.attention_mask, ones], dim=1)
    session.logits = _advance(session, tokens.unsqueeze(1), positions)
    return session.logits


def _advance(session: Decoding, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Run tokens through the model, and return the logits after the last one of each row."""
    states: Any = session.host.advance(session, input_ids, position_ids)
    return session.host.logits(states[:, -1].contiguous())


def _layers(cache: DynamicCache) -> Sequence[Any]:
    return cache.layers


def _pad_left(values: Tensor, length: int, dim: int) -> Tensor:
    missing = length - values.shape[dim]
    if missing == 0:
        return values
    shape = list(values.shape)
    shape[dim] = missing
    return torch.cat([values.new_zeros(shape), values], dim=dim)
