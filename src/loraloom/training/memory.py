"""Keeping a training step within memory where no allocation fails: on a CPU, or under a limit."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from loraloom.adapters.method import Adapter
from loraloom.errors import ConfigError
from loraloom.models.host import Host
from loraloom.models.quantization import stored_weights
from loraloom.ops.token_loss import loss_workspace_bytes
from loraloom.ranks import own_part

_RESERVE_BYTES = 100_000_000
"""Left to others, and to what else is in the process."""
_LEARNING_COPIES = 4
"""Copies of new weights to come: two optimizer states, the last sound weights, the best ones."""
_CONTAINER = Path("/sys/fs/cgroup")


def check_limit(host: Host, limit: int | None) -> None:
    """Refuse a limit that has no room for what a run keeps between its steps."""
    kept = base_bytes(host) + (1 + _LEARNING_COPIES) * adapter_bytes(host)
    if limit is not None and kept >= limit:
        raise ConfigError(
            f"a step must fit into {_in_gb(limit)} (memory_limit), base model, adapters and what "
            f"their optimizers keep take {_in_gb(kept)}; raise memory_limit, quantize the base "
            "model, or train fewer jobs at once"
        )


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or in its container; None if nobody can tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type not in ("cpu", "mps"):
        return None
    free = psutil.virtual_memory().available
    try:
        most, used = (int((_CONTAINER / f"memory.{k}").read_text()) for k in ("max", "current"))
        lines = (_CONTAINER / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such file, or no limit
        return free
    files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return min(free, most - used + files)


@dataclass
class MemoryWatch:
    """Ends a training forward while its backward pass still has room.

    On a CPU no allocation fails: the system kills the process. So what is left is looked at
    between decoder layers, and what the layers to come will take follows from those before.

    Args:
        host: Whose forwards are watched; those that take all ranks are not, as one can't leave.
        limit: Most bytes of base model, adapters and step; None for what the device has.
    """

    host: Host
    limit: int | None
    _known: set[str] = field(default_factory=set)

    @cached_property
    def _uncounted(self) -> int:
        """What else is in the process: libraries and data, and what they may still take."""
        counted = base_bytes(self.host) + adapter_bytes(self.host)
        return _used_bytes(self.host.device) - counted + _RESERVE_BYTES

    @contextmanager
    def watching(self, adapters: Sequence[Adapter], num_tokens: int) -> Iterator[None]:
        """Raise an OutOfMemoryError in a forward of so many tokens that would take too much."""
        host = self.host
        if host.ranks.in_lockstep or (self.limit is None and host.device.type == "cuda"):
            yield
            return
        layers = list(host.model.get_submodule(host.base.layers_path).children())
        sizes = {adapter.name: _bytes_of(adapter.parameters()) for adapter in adapters}
        new = sum(size for name, size in sizes.items() if name not in self._known)
        backward = sum(sizes.values()) + _LEARNING_COPIES * new
        backward += 2 * _loss_bytes(host, num_tokens, adapters)
        seen: list[int] = []

        def look(place: int, index: int, *_: Any) -> None:
            needed, left = backward, self._bytes_left()
            if place == len(seen):  # not when a checkpointed layer is computed again
                seen.append(left)
                # What malloc keeps of earlier forwards hides what the first layers take.
                taken = max(0, seen[0] - left) // max(1, index)
                needed += host.ranks.local_size * taken * (len(layers) - index)
            if left < needed and self._bytes_left(trim=True) < needed:
                raise torch.OutOfMemoryError(f"{_in_gb(left)} left, {_in_gb(needed)} needed")

        # A look takes 0.1 ms, so that not every layer of many has one.
        watched = sorted(
            {0, min(1, len(layers) - 1), *range(0, len(layers), 1 + len(layers) // 10)}
        )
        hooks = [
            layers[index].register_forward_pre_hook(partial(look, place, index))
            for place, index in enumerate(watched)
        ]
        try:
            yield
            self._known |= sizes.keys()
        finally:
            for hook in hooks:
                hook.remove()

    def _bytes_left(self, *, trim: bool = False) -> int:
        """Return what a step may still take; what malloc holds on to is given back with `trim`."""
        if trim and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        available, left = available_bytes(self.host.device), sys.maxsize
        if available is not None:
            left = available - _RESERVE_BYTES
        if self.limit is not None:
            left = min(left, self.limit - _used_bytes(self.host.device) + self._uncounted)
        return left


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def base_bytes(host: Host) -> int:
    """Return the bytes of a base model's weights and buffers on this rank."""
    return _bytes_of(_base_tensors(host))


def adapter_bytes(host: Host) -> int:
    """Return the bytes of the weights of all adapters on a host."""
    return _bytes_of(w for adapter in host.adapters.values() for w in adapter.parameters())


def _loss_bytes(host: Host, num_tokens: int, adapters: Sequence[Adapter]) -> int:
    """Logits, or gradients of a layer: three of the FFN's width, eight of the model's.

    A quantised base dequantises its widest weight on top of them. A trained head is in the base's
    dtype beside the logits, and so is its gradient before it is in the weights'.
    """
    hidden_size = host.base.hidden_size
    logits = loss_workspace_bytes(
        num_tokens, host.config.hidden_size, host.config.vocab_size, host.dtype
    )
    widest = max(out_features for out_features, _ in host.base.shapes.values())
    gradients = num_tokens * (3 * widest + 8 * hidden_size) * host.dtype.itemsize
    if host.base.quantization is not None:
        gradients += max(map(math.prod, host.base.shapes.values())) * host.dtype.itemsize
    heads = [adapter.own_at(host.base.head) for adapter in adapters]
    sizes = [sum(map(Tensor.numel, head.parameters())) for head in heads if head is not None]
    logits += max(sizes, default=0) * (2 * host.dtype.itemsize + torch.float32.itemsize)
    return max(logits, gradients)


def _base_tensors(host: Host) -> list[Tensor]:
    return [*(weight for _, weight in stored_weights(host.model)), *host.model.buffers()]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of this rank's storages by their identity."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        part = own_part(tensor)
        storage = part.untyped_storage()
        # a part of a file that is mapped into memory is a view of all of it
        sizes[storage._cdata] = storage.nbytes() if part is tensor else part.nbytes
    return sizes


def _in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
