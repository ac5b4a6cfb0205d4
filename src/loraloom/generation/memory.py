"""How much memory the cache takes."""

from __future__ import annotations

import psutil
import torch

from loraloom.generation.limits import EngineLimits
from loraloom.models.decoding import SPARE_ROWS, SPARE_TOKENS
from loraloom.models.host import Host

_SHARE = 0.25
"""Of the memory that is free: what the cache takes when nobody says how much it may."""


def bytes_per_token(host: Host) -> int:
    """Measure the bytes of a token's keys and values in all layers."""
    session = host.prefill(torch.zeros(1, 1, dtype=torch.long, device=host.device))
    states = session.states(0, 0, 1)
    return states.numel() * states.element_size()


def cache_bytes(host: Host, limits: EngineLimits) -> int:
    """Compute what the cache takes at most, spare rows and columns included."""
    tokens = limits.cache_tokens + limits.max_rows * SPARE_TOKENS
    return int(tokens * (1 + SPARE_ROWS)) * bytes_per_token(host)


def default_cache_tokens(host: Host, max_rows: int) -> int:
    """Choose the size of the cache: rows of full length, as far as a quarter of the memory goes."""
    affordable = int(_free_bytes(host.device) * _SHARE / (1 + SPARE_ROWS)) // bytes_per_token(host)
    affordable -= max_rows * SPARE_TOKENS
    return max(1, min(max_rows * host.config.max_position_embeddings, affordable))


def _free_bytes(device: torch.device) -> int:
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).mem_get_info(device)[0]
    return psutil.virtual_memory().available
