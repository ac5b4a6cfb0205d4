"""What scores depend on, and how results were got, so that they can be got again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

import loraloom
from loraloom.adapters.method import Adapter
from loraloom.data.sources import sha256
from loraloom.formats.disk import ADAPTER_FILES
from loraloom.formats.hub import find_adapter
from loraloom.models.host import Host
from loraloom.models.quantization import stored_weights

SCORING_VERSION = 1
"""Raise it with every change of the code that may change a log-likelihood."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number."""


def describe_evaluation(host: Host, adapters: Mapping[str, str], command: str) -> dict[str, Any]:
    """Describe the base model, adapters, software and machine of an evaluation."""
    device = str(host.device)
    if host.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(host.device)})"
    return {
        "base_model": host.base.name_or_path,
        "base_fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "quantization": host.base.quantization,
        "attention": host.config._attn_implementation,
        "adapters": describe_adapters(adapters),
        "scoring_version": SCORING_VERSION,
        "versions": versions(),
        "device": device,
        "platform": platform.platform(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_adapters(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Describe adapters by name: where each is from, and the hashes of its files."""
    described = {}
    for name, path in adapters.items():
        files = [find_adapter(path) / file for file in ADAPTER_FILES]
        hashes = {file.name: sha256(file) for file in files if file.is_file()}
        described[name] = {"path": path, "sha256": hashes}
    return described


def versions() -> dict[str, str]:
    """Versions of what results may depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"loraloom": loraloom.__version__, "python": platform.python_version(), **packages}


def computation_key(host: Host) -> dict[str, Any]:
    """Name everything but the adapter and the tokens that a log-likelihood depends on.

    How rows are batched is left out: it moves sums by rounding alone.
    """
    # neither where the base was loaded from nor what saved it
    left_out = ("_name_or_path", "transformers_version")
    config = {k: value for k, value in host.config.to_dict().items() if k not in left_out}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "scoring_version": SCORING_VERSION,
        "base_fingerprint": host.base.fingerprint,
        "base_weights": _weights_digest(host),
        "base_config": hashlib.sha256(text.encode()).hexdigest()[:32],
        "dtype": str(host.dtype).removeprefix("torch."),
        "attention": host.config._attn_implementation,
        "device": host.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


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
    for name, weight in stored_weights(host.model):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()])
        matrix = bits.reshape(-1, bits.shape[-1] if bits.dim() else 1)
        for dim in (0, 1):  # by row and by column: two passes over the memory, little to hash
            digest.update(matrix.sum(dim, dtype=torch.int64).cpu().numpy().data)
    return digest.hexdigest()[:32]


def json_digest(value: Any) -> str:
    """Hash a value that JSON holds, such as a question's tokens."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
