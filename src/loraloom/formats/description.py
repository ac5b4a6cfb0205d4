"""What an adapter's files say about it, with no base model loaded: `loraloom inspect`."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loraloom.adapters.keys import TensorKey, within
from loraloom.adapters.own import MODULES, TOKENS
from loraloom.formats.disk import ADAPTER_FILES, find_adapter
from loraloom.formats.files import read_stored

_KINDS = {"router": "router", "magnitude": "magnitudes"}


def describe(path_or_hub_id: str | Path) -> dict[str, Any]:
    """Give an adapter's method, settings, sizes and norms, as `inspect --json` prints them."""
    # Parameters are the adapter's, by kind, without what all layers share. Norms are those of each
    # kind of tensor over all layers and experts, without tensors that have infinite values or NaN.
    directory = find_adapter(path_or_hub_id)
    stored = read_stored(directory)
    config, tensors, base = stored.config, stored.tensors, stored.base
    keys = {name: key for name in tensors if (key := TensorKey.parse(within(name)))}
    parameters: dict[str, int] = defaultdict(int)
    norms: dict[str, list[float]] = defaultdict(list)
    for name, tensor in tensors.items():
        if key := keys.get(name):
            parameters[_kind(key)] += tensor.numel()
            kind = str(replace(key, layer=0, expert=None)).removeprefix("layers.0.")
            norms[kind].append(torch.linalg.vector_norm(tensor, dtype=torch.float64).item())
        elif name.startswith((MODULES, TOKENS)):
            parameters["tokens" if name.startswith(TOKENS) else "modules_to_save"] += tensor.numel()
    finite = {kind: list(filter(math.isfinite, values)) for kind, values in norms.items()}
    used = {key.projection for key in keys.values()}
    files = [directory / name for name in ADAPTER_FILES]
    total = sum(parameters.values())
    return {
        "path": str(path_or_hub_id),
        "layout": stored.layout,
        "method": config.title,
        "formula": config.formula,
        "settings": config.model_dump(mode="json", exclude_none=True, exclude={"target_modules"}),
        "target_modules": [t for t in config.target_modules if t.rpartition(".")[2] in used],
        "base_model": base.name_or_path,
        "base_fingerprint": base.fingerprint,
        "prompt": stored.prompt and stored.prompt.model_dump(exclude_none=True),
        "num_layers": len({key.layer for key in keys.values()}),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "parameters": dict(parameters),
        "num_parameters": total,
        "num_base_parameters": base.num_parameters,
        "percent_of_base": 100 * total / base.num_parameters if base.num_parameters else None,
        "norms": {
            kind: {"count": len(own), "min": min(own), "median": median(own), "max": max(own)}
            for kind, own in finite.items()
            if own
        },
        "num_non_finite": sum(not tensor.isfinite().all() for tensor in tensors.values()),
        "file_bytes": {path.name: path.stat().st_size for path in files if path.exists()},
    }


def _kind(key: TensorKey) -> str:
    """What a tensor is counted as: a router's, a LoRA's or an expert's, or by its own name."""
    own = "experts" if key.expert is not None else key.part
    return _KINDS.get(key.part, f"{key.block} {'LoRA' if own in ('lora_A', 'lora_B') else own}")
