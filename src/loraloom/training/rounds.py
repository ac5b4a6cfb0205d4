"""Rounds: which jobs take part in one, and one that fails or is too large is done in parts.

A job that is alone when memory runs out has its micro-batch halved, example by whole example.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import psutil
import torch
from torch import Tensor

from loraloom.adapters.method import Adapter
from loraloom.errors import ConfigError, TrainingError
from loraloom.generation.scoring import free_memory
from loraloom.models.host import Host
from loraloom.models.quantization import stored_weights
from loraloom.ops.token_loss import loss_workspace_bytes
from loraloom.ranks import own_part
from loraloom.training.job import Job
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, lay_out
from loraloom.training.step.fused import (
    forward_backward,
    gradients_set_aside,
    sum_gradients,
)

# Left to others, and to what else is in the process.
_RESERVE_BYTES = 100_000_000
# Copies of new weights to come: two optimizer states, the last sound weights, the best ones.
_LEARNING_COPIES = 4

_log = logging.getLogger(__name__)

# A job, and what it puts into the next round.
Turn = tuple[Job, MicroBatch]
# Micro-batches of one forward, with their places in the round.
Group = list[tuple[int, MicroBatch]]


class RoundRunner:
    """Runs rounds, and remembers how much fits."""

    def __init__(
        self,
        host: Host,
        pad_id: int,
        memory_limit: int | None = None,
        say: Callable[[str], None] = _log.warning,
    ):
        self.max_tokens: int | None = None  # of a forward, with padding, since memory ran out
        self._limit = memory_limit  # of base model, adapters and step; None: what the device has
        self._learning: set[str] = set()  # adapters whose optimizers have states
        self._say = say
        self._host = host
        self._pad_id = pad_id

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchLoss | TrainingError]:
        """Add each micro-batch's gradient to its adapter's, in one forward or in several."""
        faults: list[Exception] = []
        losses = [MicroBatchLoss(0.0)] * len(micro_batches)
        errors: dict[int, TrainingError] = {}
        waiting: list[Group] = [list(enumerate(micro_batches))]
        while waiting:
            group = [item for item in waiting.pop() if item[0] not in errors]
            if not group:
                continue
            halves, tokens = _halves(group), _count_tokens(group)
            if halves and self.max_tokens is not None and tokens > self.max_tokens:
                waiting += halves[::-1]
                continue
            batches = [batch for _, batch in group]
            adapters = [batch.adapter for batch in batches]
            outcome: list[MicroBatchLoss] | Exception | None = None  # memory ran out
            try:
                with gradients_set_aside(adapters), self._watching(adapters, tokens):
                    outcome = forward_backward(self._host, batches, self._pad_id)
            except torch.OutOfMemoryError:
                pass
            except Exception as error:
                outcome = error
            # Only now is the error gone, which held on to the activations.
            if outcome is None:
                free_memory()
            if isinstance(outcome, list):
                for (place, _), loss in zip(group, outcome, strict=True):
                    losses[place] += loss
            elif outcome is None and halves:
                self.max_tokens = max(map(_count_tokens, halves))
                self._say(
                    f"warning: memory ran short in a step of {tokens} tokens; "
                    f"from now on steps are computed in parts of at most {self.max_tokens}"
                )
                waiting += halves[::-1]
            elif outcome is not None and len(group) > 1:
                waiting += halves[::-1]
            else:
                place, micro_batch = group[0]
                if outcome is not None:
                    faults.append(outcome)
                errors[place] = _training_error(micro_batch, outcome)
        if faults and len(faults) == len(micro_batches):
            self.raise_if_general(faults[0])
        # Each rank has its own summand until a step's gradient is complete.
        complete = [b.adapter for i, b in enumerate(micro_batches) if b.is_last and i not in errors]
        sum_gradients(self._host.ranks, complete)
        return [errors.get(place, loss) for place, loss in enumerate(losses)]

    @cached_property
    def _uncounted(self) -> int:
        # What else is in the process, and may still be: libraries and data.
        counted = base_bytes(self._host) + adapter_bytes(self._host)
        return _used_bytes(self._host.device) - counted + _RESERVE_BYTES

    @contextmanager
    def _watching(self, adapters: Sequence[Adapter], num_tokens: int) -> Iterator[None]:
        """Raise an OutOfMemoryError in a forward while its backward pass still has room.

        On a CPU no allocation fails: the system kills the process. So what is left is looked at
        between decoder layers, and what those to come will take follows from those before.
        """
        host = self._host
        # Where a forward takes all ranks, one can't leave it.
        if host.ranks.in_lockstep or (self._limit is None and host.device.type == "cuda"):
            yield
            return
        layers = list(host.model.get_submodule(host.base.layers_path).children())
        sizes = {adapter.name: _bytes_of(adapter.parameters()) for adapter in adapters}
        new = sum(size for name, size in sizes.items() if name not in self._learning)
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
        watched = {0, min(1, len(layers) - 1), *range(0, len(layers), 1 + len(layers) // 10)}
        hooks = [
            layers[index].register_forward_pre_hook(partial(look, place, index))
            for place, index in enumerate(sorted(watched))
        ]
        try:
            yield
            self._learning |= sizes.keys()
        finally:
            for hook in hooks:
                hook.remove()

    def _bytes_left(self, *, trim: bool = False) -> int:
        # malloc holds on to what earlier forwards have freed.
        if trim and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        available, left = available_bytes(self._host.device), sys.maxsize
        if available is not None:
            left = available - _RESERVE_BYTES
        if self._limit is not None:
            left = min(left, self._limit - _used_bytes(self._host.device) + self._uncounted)
        return left

    def raise_if_general(self, fault: Exception) -> None:
        """Raise an error again if it also affects the base model (a lost device, for example)."""
        try:
            with torch.no_grad():
                self._host.hidden(torch.full((1, 1), self._pad_id, device=self._host.device))
        except Exception:
            raise fault from None


def _halves(group: Group) -> list[Group]:
    # Jobs are parted first, which changes nothing for any of them.
    if len(group) > 1:
        middle = (len(group) + 1) // 2
        return [group[:middle], group[middle:]]
    return [[(place, half)] for place, micro_batch in group for half in micro_batch.halves()]


def _count_tokens(group: Group) -> int:
    return sum(lay_out([micro_batch for _, micro_batch in group]).computed_tokens)


def _training_error(micro_batch: MicroBatch, error: Exception | None) -> TrainingError:
    name = micro_batch.adapter.name
    if isinstance(error, TrainingError):
        return error
    if error is None:
        longest = max(len(example.input_ids) for example in micro_batch.examples)
        return TrainingError(
            f"job {name}: one example must fit into memory, one of {longest} tokens does not; its "
            "last good weights are kept; lower train.max_length, set "
            "train.gradient_checkpointing: true, or train fewer jobs at once"
        )
    _log.error("job %s failed", name, exc_info=error)
    return TrainingError(
        f"job {name}: its forward or backward pass raised {type(error).__name__}: {error}; its "
        "last good weights are kept"
    )


def choose_turns(turns: Sequence[Turn], max_tokens: int | None) -> list[Turn]:
    """Choose the micro-batches that go into the next round, and count their tokens.

    A job's pass is the tokens that were computed for it, divided by its priority. The job with the
    least pass goes first, and others fill what is left of the round, so that over time each has a
    share in proportion to its priority. Checkpoints keep the passes: a resumed run chooses alike.

    Source:
        Waldspurger and Weihl 1995, Stride Scheduling, MIT/LCS/TM-528.
    """
    if max_tokens is None:
        return list(turns)
    names: set[str] = set()
    chosen: list[MicroBatch] = []
    for job, batch in sorted(turns, key=lambda turn: turn[0].scheduler_pass):
        if not chosen or sum(lay_out([*chosen, batch]).computed_tokens) <= max_tokens:
            chosen.append(batch)
            names.add(job.name)
    turns = [(job, batch) for job, batch in turns if job.name in names]
    computed = lay_out([batch for _, batch in turns]).computed_tokens
    for (job, _), tokens in zip(turns, computed, strict=True):
        job.scheduler_pass += tokens / job.config.priority
    return turns


def check_fits(job: Job, max_tokens: int | None) -> None:
    """Check that a job can take part in a round."""
    needed = job.order.max_micro_batch_tokens
    if max_tokens is not None and needed > max_tokens:
        raise ConfigError(
            f"job {job.name}: max_tokens_per_step must hold the job's longest micro-batch, which "
            f"has {needed} tokens with padding, got {max_tokens}; raise it, or lower "
            "train.micro_batch_size or train.max_length"
        )


def check_limit(host: Host, limit: int | None) -> None:
    """Check that a limit has room for what a run keeps between its steps."""
    kept = base_bytes(host) + (1 + _LEARNING_COPIES) * adapter_bytes(host)
    if limit is not None and kept >= limit:
        raise ConfigError(
            f"a step must fit into {_in_gb(limit)} (memory_limit), base model, adapters and what "
            f"their optimizers keep take {_in_gb(kept)}; raise memory_limit, quantize the base "
            "model, or train fewer jobs at once"
        )


def available_bytes(device: torch.device) -> int | None:
    """Return the memory that is free on a device; None if nobody can tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


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
    shapes = host.base.shapes.values()
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
