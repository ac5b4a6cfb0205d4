"""Keys that tie random numbers to a sample."""

from __future__ import annotations

from loraloom.ops.dropout import mix64


def sample_key(seed: int, epoch: int, sample_id: int) -> int:
    """Hash a job's seed, the epoch and a sample's id to the key of the sample's random numbers."""
    return mix64(seed, epoch, sample_id)
