"""The memory of training steps, predicted from forwards of a few tokens.

Weights, gradients and optimizer states are counted. What a forward keeps for its backward pass
depends on the model, the method and the kind of attention, so it is looked at: autograd is watched
in forwards of a few tokens, and what it keeps is scaled to the round's rows. A row of L tokens
keeps a·L + b·L² bytes (the square is in attention's masks), and an adapter's weights in their
compute form a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loraloom.adapters.contract import Adapter
from loraloom.base.quantization import stored_weights
from loraloom.data.tokens import first_fit
from loraloom.distributed import own_part
from loraloom.host.host import Host
from loraloom.ops.token_loss import loss_workspace_bytes
from loraloom.training.job import Job

_TOKENS = 32
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


def _gathered_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a sharded model that are put together now; none of another model."""
    if not isinstance(model, FSDPModule):
        return []
    return [weight for weight in model.parameters() if not isinstance(weight, DTensor)]


def kept_bytes(host: Host, job: Job, rows: int, length: int) -> int:
    """Count the storages that autograd keeps in a forward of rows with padding."""
    base = [weight for _, weight in stored_weights(host.model)]
    weights = [*base, *host.model.buffers(), *job.adapter.parameters()]
    known = _storages(weights).keys()
    kept: dict[int, int] = {}

    def look(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in known and key not in _storages(_gathered_weights(host.model)):
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


def base_bytes(host: Host) -> int:
    """Return the bytes of a base model's weights and buffers on this rank."""
    return _bytes_of([*(w for _, w in stored_weights(host.model)), *host.model.buffers()])


def adapter_bytes(host: Host) -> int:
    """Return the bytes of the weights of all adapters on a host."""
    return _bytes_of(w for adapter in host.adapters.values() for w in adapter.parameters())


def _loss_bytes(host: Host, num_tokens: int, adapters: Sequence[Adapter]) -> int:
    """Logits, or gradients of a layer: three of the FFN's width, eight of the model's."""
    vocabulary = (host.config.hidden_size, host.config.vocab_size)
    logits = loss_workspace_bytes(num_tokens, *vocabulary, host.dtype)
    shapes = [shape for block in host.base.blocks for shape in block.shapes.values()]
    elements = num_tokens * (3 * max(rows for rows, _ in shapes) + 8 * host.base.hidden_size)
    if host.base.quantization is not None:  # its widest weight, dequantized
        elements += max(map(math.prod, shapes))
    heads = [adapter.own_at(host.base.head) for adapter in adapters]
    sizes = [sum(map(Tensor.numel, head.parameters())) for head in heads if head is not None]
    # A trained head in the base's dtype, its gradient in that, and in the weights'.
    logits += max(sizes, default=0) * (2 * host.dtype.itemsize + torch.float32.itemsize)
    return max(logits, elements * host.dtype.itemsize)


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of this rank's storages by their identity."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        part = own_part(tensor)
        storage = part.untyped_storage()
        # A part of a file that is mapped into memory is a view of all of it.
        sizes[storage._cdata] = storage.nbytes() if part is tensor else part.nbytes
    return sizes


def _in_gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
