"""Keys that tie random numbers to a sample."""

from __future__ import annotations

import torch

from loraloom.ops.dropout import mix64


def sample_key(seed: int, epoch: int, sample_id: int) -> int:
    """Hash a job's seed, the epoch and a sample's id to the key of the sample's random numbers."""
    return mix64(seed, epoch, sample_id)


def draw_sample_keys(count: int) -> list[int]:
    """Draw keys from torch's own generator: who saves and restores its state goes on with them."""
    return torch.randint(2**62, (count,)).tolist()
