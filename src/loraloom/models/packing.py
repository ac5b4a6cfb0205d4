"""Rows that hold several samples side by side.

Axes: B rows, L tokens of a row.

Positions count anew from each sample's first token. From that alone transformers makes the masks of
every kind of layer, also of sliding windows: a token sees its own sample. What is left at a row's
end is padding, a sample of its own to the attention, so that no token sees nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.errors import ModelError
from loraloom.models.families import keeps_running_states

_TAKE_PACKED_ROWS = ("sdpa", "eager")

SampleLengths = Sequence[Sequence[int]]
"""Tokens of the samples in each row, from its left."""


def check_takes_packed_rows(config: Any) -> None:
    """Check that a model can keep the samples of a row apart."""
    if keeps_running_states(config):
        raise ModelError(
            "packing needs attention in all layers, got layers that keep running states, which "
            "would go from sample to sample; set packing: false and group_by_length: true"
        )
    implementation = config._attn_implementation
    if implementation not in _TAKE_PACKED_ROWS:
        raise ModelError(
            f"packing needs attention that takes a mask, attn_implementation "
            f"{' or '.join(_TAKE_PACKED_ROWS)}, got {implementation!r}; "
            "choose one of them, or set packing: false and group_by_length: true"
        )


def packed_positions(sample_lengths: SampleLengths, length: int) -> Tensor:
    """Return the place of each token in its sample, [B, L]; padding counts on its own."""
    rows = [
        torch.cat([torch.arange(one) for one in (*lengths, length - sum(lengths))])
        for lengths in sample_lengths
    ]
    return torch.stack(rows)


def packed_token_mask(sample_lengths: SampleLengths, length: int) -> Tensor:
    """Return 1 at tokens of samples and 0 at padding, [B, L]."""
    filled = torch.tensor([sum(lengths) for lengths in sample_lengths])
    return (torch.arange(length) < filled[:, None]).long()
