"""Gradients of several ranks: added up once a step, while the backward pass makes further ones.

The gradients lie in one buffer, last layers first, about as a backward pass comes to them. It is
cut into buckets, and one is sent when it is complete and those before it are on their way. So all
ranks send the same buckets in the same order, also one whose backward pass fails half-way.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from loraloom.adapters.adapter import Adapter
from loraloom.ranks import Ranks
from loraloom.training.step.micro_batch import MicroBatch

BUCKET_BYTES = 25 * 2**20
"""About as much as is sent at once; PyTorch's DistributedDataParallel takes as much."""


def completed_weights(ranks: Ranks, micro_batches: Sequence[MicroBatch]) -> list[list[Parameter]]:
    """Return, by adapter, the weights whose gradients these micro-batches complete, to add up."""
    if ranks.size == 1:
        return []
    return [
        [weight for weight in batch.adapter.parameters() if weight.requires_grad]
        for batch in micro_batches
        if batch.is_last
    ]


def sum_gradients(ranks: Ranks, weights: Sequence[Sequence[Parameter]]) -> None:
    """Add up the gradients that are there; see `summing_gradients`."""
    if ranks.size == 1 or not weights:
        return
    with ranks.together():
        summing = summing_gradients(ranks, weights)
    with summing:
        pass


def summing_gradients(
    ranks: Ranks, weights: Sequence[Sequence[Parameter]]
) -> AbstractContextManager[None]:
    """Make a context for a backward pass, at whose end gradients are added up over all ranks.

    Earlier micro-batches' gradients are added too; their tensors stay as they are. A weight that no
    rank has a gradient of gets none. All memory is taken now.
    """
    return _GradientSum(ranks, weights) if weights else nullcontext()


class _GradientSum(AbstractContextManager[None]):
    def __init__(self, ranks: Ranks, weights: Sequence[Sequence[Parameter]]):
        self._ranks = ranks
        self._owners = _last_layers_first(weights)
        sizes = [owner.numel() for owner in self._owners]
        buffer = self._owners[0].new_zeros(sum(sizes) + len(sizes))
        *self._pieces, self._counts = buffer.split([*sizes, len(sizes)])
        self._is_present = torch.zeros(len(sizes))
        self._bucket_of = [end * buffer.itemsize // BUCKET_BYTES for end in accumulate(sizes)]
        self._missing = Counter(self._bucket_of)
        lengths = Counter()
        for bucket, size in zip(self._bucket_of, sizes, strict=True):
            lengths[bucket] += size
        lengths[self._bucket_of[-1]] += len(sizes)
        self._missing[self._bucket_of[-1]] += 1  # the counts, which are known at the end
        self._unsent = deque(zip(lengths, buffer.split(list(lengths.values())), strict=True))
        self._waits: list[Callable[[], None]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for place, (owner, piece) in enumerate(zip(self._owners, self._pieces, strict=True)):
            if owner.grad is not None:
                piece.view_as(owner).copy_(owner.grad)
                self._is_present[place] = 1
            owner.grad = piece.view_as(owner)
            hook = partial(self._note_complete, place)
            self._hooks.append(owner.register_post_accumulate_grad_hook(hook))

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None and not issubclass(kind, Exception):
            return  # the process ends
        self._counts.copy_(self._is_present)
        while self._unsent:
            self._send()
        for wait in self._waits:
            wait()
        if kind is None:
            for owner, count in zip(self._owners, self._counts.tolist(), strict=True):
                if not count:
                    owner.grad = None

    def _note_complete(self, place: int, _: Tensor) -> None:
        self._is_present[place] = 1
        self._missing[self._bucket_of[place]] -= 1
        # In lockstep layers of the base model travel now, and two streams might block each other.
        while not self._ranks.in_lockstep and not self._missing[self._unsent[0][0]]:
            self._send()

    def _send(self) -> None:
        _, bucket = self._unsent.popleft()
        self._waits.append(self._ranks.start_sum(bucket))


def _last_layers_first(weights: Sequence[Sequence[Parameter]]) -> list[Parameter]:
    """Join the weights of adapters, each in reverse order, so that like layers are together."""
    places = [(place / len(own), weight) for own in weights for place, weight in enumerate(own)]
    return [weight for _, weight in sorted(places, key=itemgetter(0), reverse=True)]


@contextmanager
def gradients_set_aside(
    adapters: Sequence[Adapter], completed: Sequence[Sequence[Parameter]] = ()
) -> Iterator[None]:
    """Add what backward passes give to the gradients that are there, but only if they end.

    They may fail half-way, so they get empty gradients; the others come back in any case.
    """
    before = {weight: weight.grad for adapter in adapters for weight in adapter.parameters()}
    apart = before.keys() - {weight for own in completed for weight in own}
    for weight in apart:
        weight.grad = None
    try:
        yield
    except BaseException:
        for weight, gradient in before.items():
            weight.grad = gradient
        raise
    for weight in apart:
        gradient = before[weight]
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)
