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
from torch import Tensor

import loraloom
from loraloom.adapters.method import Adapter
from loraloom.data.sources import sha256
from loraloom.data.tasks import QuestionSet, questions_digest
from loraloom.formats.contents import ADAPTER_FILES
from loraloom.formats.hub import find_adapter
from loraloom.models.host import Host
from loraloom.models.quantised import stored_weights

SCORING_VERSION = 1
"""Raise it with every change of the code that may change a log-likelihood."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a number."""


def describe_evaluation(host: Host, adapters: Mapping[str, str], command: str) -> dict[str, Any]:
    """Describe the base model, adapters, software and machine of an evaluation."""
    return {
        "base_model": host.base.name_or_path,
        "base_fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "quantization": host.base.quantization,
        "attention": attention(host),
        "adapters": describe_adapters(adapters),
        "scoring_version": SCORING_VERSION,
        "versions": versions(),
        "device": _describe_device(host.device),
        "platform": platform.platform(),
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_questions(asked: QuestionSet) -> dict[str, Any]:
    """Describe a task's questions: how many, scored how, and hashes of them and of their file."""
    return {
        "split": asked.split,
        "scoring": asked.scoring,
        "num_questions": len(asked.questions),
        "questions_sha256": questions_digest(asked.questions),
        "source": asked.source,
    }


def describe_adapters(adapters: Mapping[str, str]) -> dict[str, Any]:
    """Describe adapters by name: where each is from, and the hashes of its files."""
    return {name: _describe_adapter(path) for name, path in adapters.items()}


def versions() -> dict[str, str]:
    """Versions of what results may depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"loraloom": loraloom.__version__, "python": platform.python_version(), **packages}


def _describe_adapter(path: str) -> dict[str, Any]:
    directory = find_adapter(path)
    names = [name for name in ADAPTER_FILES if (directory / name).is_file()]
    return {"path": path, "sha256": {name: sha256(directory / name) for name in names}}


def _describe_device(device: torch.device) -> str:
    """Name the device, an accelerator with its model."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


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
    for name, weight in stored_weights(host.model):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        for sums in _bit_sums(weight):
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
