"""What the plug-in is told by the environment, as vLLM's processes inherit it."""

from __future__ import annotations

import os

from loraloom.errors import AdapterError, ConfigError, shown

ADAPTER_DIR = "LORALOOM_ADAPTER_DIR"
"""A directory of adapters that are found by their names."""
MAX_TOP_K = "LORALOOM_MAX_TOP_K"
"""The largest top_k of a mixture; FFN blocks compute this many experts of each token."""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM takes for --max-lora-rank."""


def max_top_k() -> int:
    """The largest top_k of a mixture, 2 unless the environment says another."""
    said = os.environ.get(MAX_TOP_K, "2")
    if not said.isdecimal() or int(said) < 1:
        raise ConfigError(f"{MAX_TOP_K} must be a whole number of at least 1, got {shown(said)}")
    return int(said)


def fitting_rank(rank: int) -> int:
    """The smallest --max-lora-rank in which a rank has room."""
    for possible in _RANKS:
        if possible >= rank:
            return possible
    raise AdapterError(
        f"vLLM takes LoRAs of rank {_RANKS[-1]} at most, got {rank} (a mixture's experts times "
        "their rank); serve it with the embedded engine"
    )
