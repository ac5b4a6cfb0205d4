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

from loraloom.models.forward import PreparedWeights, Record
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

    @classmethod
    def resume(
        cls, host: Host, adapter: RowAdapter, states: Tensor, prepared: PreparedWeights
    ) -> Decoding:
        """Make a session of one row from what `states` took out of another one.

        It has no logits yet: the first `extend` gives them.

        Args:
            host: Whose row it is.
            adapter: The one that computed the states.
            states: Of the row's first tokens, [layers, 2, heads, L, head_dim].
            prepared: Takes the weights in compute form.
        """
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(states.unsqueeze(2)):  # (2, 1, heads, L, head_dim)
            cache.update(keys, values, layer)
        mask = torch.ones(1, states.shape[3], dtype=torch.long, device=states.device)
        return cls(host, [adapter], cache, mask, states.new_empty(0), prepared)

    def __len__(self) -> int:
        """Rows."""
        return len(self.adapters)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [B]."""
        return self.attention_mask.sum(1)

    def states(self, row: int, start: int, stop: int) -> Tensor:
        """Copy keys and values of a row's tokens, [layers, 2, heads, stop - start, head_dim].

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
            ]
        )

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
    prepared: PreparedWeights | None = None,
) -> Decoding:
    """Read prompts; see `Host.prefill`. `prepared` takes the weights in compute form."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    names: list[RowAdapter] = [None] * len(input_ids) if adapters is None else list(adapters)
    # Without the model's config the cache keeps all tokens in each layer; masks see to windows.
    prepared = PreparedWeights() if prepared is None else prepared
    session = Decoding(host, names, DynamicCache(), mask, input_ids.new_empty(0), prepared)
    session.logits = _advance(session, input_ids, mask.cumsum(1).sub(1).clamp_min(0))
    return session


def decode(session: Decoding, tokens: Tensor, record: Record | None = None) -> Tensor:
    """Continue every row by a token; see `Host.decode`. `record` takes what routers do."""
    return extend(session, tokens.unsqueeze(1), record)


@torch.no_grad()
def extend(session: Decoding, input_ids: Tensor, record: Record | None = None) -> Tensor:
    """Continue every row by the same number of tokens.

    Args:
        session: Its rows.
        input_ids: Their next tokens, [B, L].
        record: Takes what routers do.

    Returns:
        Logits of the tokens after the last ones, [B, V].
    """
    positions = session.lengths.unsqueeze(1) + torch.arange(
        input_ids.shape[1], device=input_ids.device
    )
    ones = session.attention_mask.new_ones(input_ids.shape)
    session.attention_mask = torch.cat([session.attention_mask, ones], dim=1)
    session.logits = _advance(session, input_ids, positions, record)
    return session.logits


def _advance(
    session: Decoding, input_ids: Tensor, position_ids: Tensor, record: Record | None = None
) -> Tensor:
    """Run tokens through the model, and return the logits after the last one of each row."""
    states: Any = session.host.advance(session, input_ids, position_ids, record)
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
