"""What scores depend on: the base model's weights, an adapter's, and how they are computed."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter
from loraloom.models.host import Host

SCORING_VERSION = 1
"""Raise it with every change of the code that may change a log-likelihood."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number."""


def computation_key(host: Host) -> dict[str, Any]:
    """Name everything but the adapter and the tokens that a log-likelihood depends on.

    How rows are batched is left out: it moves sums by rounding alone.
    """
    return {
        "scoring_version": SCORING_VERSION,
        "base_fingerprint": host.base.fingerprint,
        "base_weights": _weights_digest(host),
        "base_config": _config_digest(host),
        "dtype": str(host.dtype).removeprefix("torch."),
        "attention": attention(host),
        "device": host.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def attention(host: Host) -> str:
    """Name the attention implementation that transformers uses."""
    return host.config._attn_implementation


def adapter_digest(adapter: Adapter) -> str:
    """Hash an adapter's settings and weights as they are now, with SHA-256."""
    digest = hashlib.sha256(adapter.config.model_dump_json().encode())
    for name, tensor in sorted(adapter.tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights_digest(host: Host) -> str:
    """Hash sums of every base tensor's bits: each weight and its place count."""
    digest = hashlib.sha256()
    for name, parameter in host.model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for sums in _bit_sums(parameter):
            digest.update(sums.cpu().numpy().data)
    return digest.hexdigest()[:32]


def _bit_sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a tensor's bits by row and by column: two passes over the memory, little to hash."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    matrix = bits.reshape(-1, bits.shape[-1] if bits.dim() else 1)
    return matrix.sum(0, dtype=torch.int64), matrix.sum(1, dtype=torch.int64)


def _config_digest(host: Host) -> str:
    """Hash the base's settings, but not where it was loaded from or what saved it."""
    config = host.config.to_dict()
    settings = {
        name: value
        for name, value in config.items()
        if name not in ("_name_or_path", "transformers_version")
    }
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
