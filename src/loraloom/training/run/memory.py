"""How much memory the largest round takes, told before the first one.

Weights, gradients and optimizer states are counted. What a forward keeps for its backward pass
depends on the model, the method and the kind of attention, so it is looked at: autograd is watched
in forwards of a few tokens, and what it keeps is scaled to the round's rows. A row of L tokens
keeps a·L + b·L² bytes (the square is in attention's masks), and an adapter's weights in their
compute form a constant.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import psutil
import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter
from loraloom.data.packing import first_fit
from loraloom.errors import ConfigError
from loraloom.models.host import Host
from loraloom.models.quantised import stored_weights
from loraloom.models.sharding import gathered_weights
from loraloom.ops.token_loss import loss_workspace_bytes
from loraloom.ranks import own_part
from loraloom.training.run.container import container_bytes_left
from loraloom.training.run.job import Job

_TOKENS = 32
_RESERVE_BYTES = 100_000_000
"""Left to others, and to what else is in the process."""
_CPU_ALLOCATOR_SHARE, _ALLOCATOR_SHARE = 0.15, 0.05
"""What an allocator leaves unused between tensors that are kept, as a share of them."""
_CPU_CHECKPOINT_ROOM = 4.5
"""Room that a checkpointed layer's input takes, in its sizes: glibc doesn't give back what lies
freed between the inputs that are kept (SmolLM2: 342 MB of which 76 MB are in use)."""
_STATE_OF_8_BITS = (1 + 4 / 256) / 4
_OPTIMIZER_STATES = {
    "sgd": 0,
    "adafactor": 0,
    "adagrad": 1,
    "rmsprop": 1,
    "adamw_8bit": 2 * _STATE_OF_8_BITS,
    "ademamix_8bit": 3 * _STATE_OF_8_BITS,
    "lion_8bit": _STATE_OF_8_BITS,
}
"""Copies of the weights that optimizers keep, paged ones too; others keep two."""


@dataclass(frozen=True)
class MemoryPrediction:
    """The largest round's memory, in bytes.

    Args:
        base_model: Its weights.
        adapters: All adapters' weights, also those that are references.
        learning: Optimizer states, the last weights that proved sound, on a CPU the best ones, and
            gradients, unless they come while as much of the activations goes.
        activations: What the forward keeps for the backward pass.
        loss: Logits, or else what the backward pass of one layer needs, whichever is more.
        rows: Of the largest round.
        length: Tokens of each.
    """

    base_model: int
    adapters: int
    learning: int
    activations: int
    loss: int
    rows: int
    length: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.loaded + self.learning + self.activations + self.loss

    @property
    def loaded(self) -> int:
        """What is there before the first round."""
        return self.base_model + self.adapters

    def describe(self) -> str:
        """Name the parts."""
        names = [field.name for field in fields(self) if field.name not in ("rows", "length")]
        parts = (f"{name.replace('_', ' ')} {_in_gb(getattr(self, name))}" for name in names)
        return (
            f"{_in_gb(self.total)} for a step of {self.rows} rows of {self.length} tokens "
            f"({', '.join(parts)})"
        )


def predict_memory(
    host: Host, jobs: Sequence[Job], max_tokens_per_step: int | None = None
) -> MemoryPrediction:
    """Predict the memory of the largest round that jobs may take together, on one of its ranks."""
    num_ranks = host.ranks.size
    counts, lengths = zip(*(step_rows(job, num_ranks) for job in jobs), strict=True)
    bound = None if max_tokens_per_step is None else -(-max_tokens_per_step // num_ranks)
    length, on_cpu = max(lengths), host.device.type == "cpu"
    checkpointed = any(job.config.train.gradient_checkpointing for job in jobs)
    costs = watch_forwards(host, jobs)
    per_row = [cost.per_row(length) for cost in costs]
    if checkpointed:
        inputs = length * host.base.hidden_size * host.dtype.itemsize * host.base.num_layers
        inputs *= _CPU_CHECKPOINT_ROOM if on_cpu else 1.0
        per_row = [inputs + whole / host.base.num_layers for whole in per_row]
    rows = _largest_round(counts, per_row, length, bound)
    activations = sum(cost.constant for cost in costs)
    activations += sum(count * cost for count, cost in zip(rows, per_row, strict=True))
    if not checkpointed:
        activations *= 1 + (_CPU_ALLOCATOR_SHARE if on_cpu else _ALLOCATOR_SHARE)
    adapters = [_bytes_of(job.adapter.parameters()) for job in jobs]
    copies = [
        _learning_copies(job, at_once=checkpointed or num_ranks > 1)
        + (on_cpu and job.config.selection_metric is not None)  # the best weights
        for job in jobs
    ]
    return MemoryPrediction(
        base_model=base_bytes(host),
        adapters=adapter_bytes(host),
        learning=round(sum(count * size for count, size in zip(copies, adapters, strict=True))),
        activations=max(round(activations), sum(adapters)),
        loss=_loss_bytes(host, sum(rows) * length, [job.adapter for job in jobs]),
        rows=sum(rows),
        length=length,
    )


def check_memory(
    prediction: MemoryPrediction, limit: int | None, device: torch.device, local_size: int = 1
) -> None:
    """Refuse a run whose largest round does not fit."""
    name = "memory_limit"
    if limit is None:
        available = available_bytes(device)
        if available is None:
            return
        if device.type == "cpu":
            available //= local_size
        limit, name = available + prediction.loaded, f"what {device} has"
    if prediction.total > limit:
        raise ConfigError(
            f"a step must fit into {_in_gb(limit)} ({name}), it is predicted to take "
            f"{prediction.describe()}; lower train.micro_batch_size or train.max_length, "
            "set train.gradient_checkpointing: true or max_tokens_per_step, train fewer jobs at "
            "once, or set memory_limit where you know better"
        )


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device, or in its container; None if nobody can tell."""
    if device.type in ("cpu", "mps"):
        free, left = psutil.virtual_memory().available, container_bytes_left()
        return free if left is None else min(free, left)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return None


@dataclass(frozen=True)
class MemoryWatch:
    """Ends a training forward while its backward pass still has room.

    On a CPU no allocation fails: the system kills the process. So what is left is looked at before
    each decoder layer, and what the layers to come will take follows from those before.

    Args:
        host: Whose forwards are watched; those that take all ranks are not, as one can't leave.
        limit: Most bytes of base model, adapters and step; None for what the device has.
    """

    host: Host
    limit: int | None

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
        gradients = sum(_bytes_of(adapter.parameters()) for adapter in adapters)
        backward = gradients + 2 * _loss_bytes(host, num_tokens, adapters)
        seen: list[int] = []

        def look(index: int, *_: Any) -> None:
            needed, left = backward, self._bytes_left()
            if index == len(seen):  # not when a checkpointed layer is computed again
                seen.append(left)
                # What malloc keeps of earlier forwards hides what the first layers take.
                taken = max(0, seen[0] - left) // max(1, index)
                needed += host.ranks.local_size * taken * (len(layers) - index)
            if left < needed and self._bytes_left(trim=True) < needed:
                raise torch.OutOfMemoryError(f"{_in_gb(left)} left, {_in_gb(needed)} needed")

        hooks = [
            layer.register_forward_pre_hook(partial(look, index))
            for index, layer in enumerate(layers)
        ]
        try:
            yield
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


def step_rows(job: Job, num_ranks: int = 1) -> tuple[int, int]:
    """Return the most rows that a job puts into a rank's forward, and their length in tokens.

    They are those of its longest examples.
    """
    train = job.config.train
    count = min(train.micro_batch_size, train.batch_size)
    lengths = [length for rows in job.training_set.longest(count)[::num_ranks] for length in rows]
    if not train.packing:
        return len(lengths), max(lengths)
    packed = first_fit(lengths, train.max_length)
    return len(packed), max(sum(lengths[place] for place in row) for row in packed)


@dataclass(frozen=True)
class ForwardCost:
    """What an adapter's forward keeps for its backward pass, in bytes.

    Args:
        constant: Whatever the rows.
        per_token: Of each token.
        per_square: Times the square of each row's length.
    """

    constant: float
    per_token: float
    per_square: float

    def per_row(self, length: int) -> float:
        """Return what a row of so many tokens keeps."""
        return self.per_token * length + self.per_square * length**2


def watch_forwards(host: Host, jobs: Sequence[Job]) -> list[ForwardCost]:
    """Tell what the forward of each job keeps; each kind of adapter is looked at once."""
    host.enable_gradient_checkpointing(False)
    kinds = {job.config.adapter.model_dump_json(): job for job in jobs}
    costs = {kind: _watch(host, job) for kind, job in kinds.items()}
    return [costs[job.config.adapter.model_dump_json()] for job in jobs]


def _watch(host: Host, job: Job) -> ForwardCost:
    """Solve bytes(rows, length) = constant + rows·(a·length + b·length²) from three forwards."""
    short = kept_bytes(host, job, rows=2, length=_TOKENS)
    more = kept_bytes(host, job, rows=4, length=_TOKENS)
    long = kept_bytes(host, job, rows=2, length=2 * _TOKENS)
    constant = float(2 * short - more)
    per_row, per_long_row = (short - constant) / 2, (long - constant) / 2
    per_square = (per_long_row - 2 * per_row) / (2 * _TOKENS**2)
    return ForwardCost(constant, per_row / _TOKENS - per_square * _TOKENS, per_square)


def kept_bytes(host: Host, job: Job, rows: int, length: int) -> int:
    """Count the storages that autograd keeps in a forward of rows with padding."""
    weights = [*_base_tensors(host), *job.adapter.parameters()]
    known = _storages(weights).keys()
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in known and key not in _storages(gathered_weights(host.model)):
            kept[key] = storage.nbytes()
        return tensor.detach()  # an output kept as it is would keep its own node, for good

    input_ids = torch.zeros(rows, length, dtype=torch.long, device=host.device)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -1] = 0
    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        output = host.hidden(input_ids, mask, [job.name] * rows, training=True)
    del output
    return sum(kept.values())


def _largest_round(
    counts: Sequence[int], costs: Sequence[float], length: int, max_tokens: int | None
) -> list[int]:
    """Fill a round with rows of jobs, those that cost most first, up to a bound of tokens."""
    left = max_tokens // length if max_tokens is not None else sum(counts)
    left = max(left, *counts)
    rows = [0] * len(counts)
    for place in sorted(range(len(counts)), key=lambda place: -costs[place]):
        rows[place] = min(counts[place], left)
        left -= rows[place]
    return rows


def _learning_copies(job: Job, *, at_once: bool) -> float:
    """Count copies of the weights beside them, at the beginning of a backward pass."""
    train = job.config.train
    earlier_gradients = int(train.micro_batch_size < train.batch_size)
    states = float(_OPTIMIZER_STATES.get(train.optimizer.removeprefix("paged_"), 2))
    return states + earlier_gradients + int(at_once) + 1


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
