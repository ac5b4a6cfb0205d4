"""Autocast is the base model's: adapters choose their own dtypes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def outside_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off where it is on for the tensor's device."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if _is_on(device) else _NOTHING


def compute_dtype(model_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the base's outputs: autocast's where it is on."""
    if _is_on(device.type):
        return torch.get_autocast_dtype(device.type)
    return model_dtype


def _is_on(device: str) -> bool:
    """Whether autocast is on; the meta device has none."""
    return device != "meta" and torch.is_autocast_enabled(device)
