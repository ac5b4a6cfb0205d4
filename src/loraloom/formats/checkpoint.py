"""Whole models on disk, as transformers' `from_pretrained` reads them, written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"


def write_shards(
    directory: Path, shards: Iterable[Mapping[str, Tensor]], num_shards: int, dtype: torch.dtype
) -> int:
    """Write a file for each shard and the index of their tensors.

    Args:
        directory: Where to.
        shards: Tensors by name; each shard is made when its turn comes, and then let go.
        num_shards: How many they are.
        dtype: Of the tensors in the files.

    Returns:
        Bytes of all tensors.
    """
    files: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{num_shards:05}.safetensors"
        tensors = {key: tensor.to("cpu", dtype).contiguous() for key, tensor in shard.items()}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del shard, tensors  # before the next one is made
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total_bytes


def read_index(directory: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    return json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
