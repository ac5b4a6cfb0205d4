"""Whole models on disk, as transformers' `from_pretrained` reads them, written tensor by tensor.

safetensors' own writer wants all tensors of a file at once, which would be a layer with all of its
experts; here a tensor is made when its bytes are written.

Source: the format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is wanted.

    Args:
        shape: Its shape.
        make: Makes it.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        """Stand for a tensor that is there."""
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    def part(self, place: tuple[int | slice, ...]) -> LazyTensor:
        """Stand for what is at a place of it."""
        if not place:
            return self
        shape = torch.empty(self.shape, device="meta")[place].shape
        return LazyTensor(tuple(shape), lambda: self.make()[place])


def write_shards(
    directory: Path, shards: Iterable[Mapping[str, LazyTensor]], num_shards: int, dtype: torch.dtype
) -> int:
    """Write a file for each shard and the index of their tensors."""
    files: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{num_shards:05}.safetensors"
        total_bytes += _write_file(directory / name, shard, dtype)
        files |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total_bytes


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> int:
    """Write a file, and return its tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + math.prod(tensor.shape) * dtype.itemsize
        offsets = {"shape": tensor.shape, "data_offsets": [start, stop]}
        header[name] = {"dtype": _NAMES[dtype], **offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = tensor.make().to("cpu", dtype).contiguous()
            assert tuple(value.shape) == tuple(tensor.shape), name
            file.write(value.flatten().view(torch.uint8).numpy().data)
    return stop


def read_index(directory: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    return json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
