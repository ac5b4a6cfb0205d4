"""Fused steps that fit into memory: one that runs out of it is done again in parts.

Jobs are parted first, which changes nothing for any of them. A job that is alone has its
micro-batch halved, example by whole example, down to one.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from loraloom.errors import TrainingError
from loraloom.models.host import Host
from loraloom.train.micro_batch import MicroBatch, MicroBatchLoss
from loraloom.train.rows import lay_out
from loraloom.train.step import forward_backward

Group = list[tuple[int, MicroBatch]]
"""Micro-batches of one forward, with their places in the step."""


class StepRunner:
    """Runs fused steps, and remembers how much fits.

    Args:
        host: In training mode when it runs.
        pad_id: Token to pad with.
    """

    def __init__(self, host: Host, pad_id: int):
        self.max_tokens: int | None = None
        """Most tokens of a forward, with padding, since memory ran out; None before."""
        self._host = host
        self._pad_id = pad_id

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchLoss | TrainingError]:
        """Add each micro-batch's gradient to its adapter's, in one forward or in several.

        Args:
            micro_batches: One of each job.

        Returns:
            The losses in their order; an error for each job of which one example doesn't fit.
        """
        outcomes: list[MicroBatchLoss | TrainingError] = [MicroBatchLoss(0.0)] * len(micro_batches)
        waiting: list[Group] = [list(enumerate(micro_batches))]
        while waiting:
            group = [one for one in waiting.pop() if not isinstance(outcomes[one[0]], Exception)]
            if not group:
                continue
            if not group:
                continue
            halves = _halves(group)
            if halves and self._is_too_large(group):
                waiting += halves[::-1]
                continue
            losses = self._attempt([part for _, part in group])
            if losses is not None:
                for (place, _), loss in zip(group, losses, strict=True):
                    outcomes[place] += loss  # pyright: ignore[reportOperatorIssue]
            elif halves:
                self.max_tokens = max(map(_count_tokens, halves))
                waiting += halves[::-1]
            else:
                outcomes[group[0][0]] = _does_not_fit(group[0][1])
        return outcomes

    def _is_too_large(self, group: Group) -> bool:
        return self.max_tokens is not None and _count_tokens(group) > self.max_tokens

    def _attempt(self, parts: Sequence[MicroBatch]) -> list[MicroBatchLoss] | None:
        """Add the gradients of a forward; None if memory runs out, gradients are as before then.

        What is there already is set aside meanwhile, as a backward pass may end half-way.
        """
        weights = [weight for part in parts for weight in part.adapter.parameters()]
        before = [weight.grad for weight in weights]
        _set_gradients(weights, [None] * len(weights))
        try:
            losses = forward_backward(self._host, parts, self._pad_id)
        except torch.OutOfMemoryError:
            losses = None
        if losses is None:  # the error, which holds on to the activations, is gone by now
            _set_gradients(weights, before)
            _free_memory()
            return None
        for weight, gradient in zip(weights, before, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)
        return losses


def _set_gradients(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _halves(group: Group) -> list[Group]:
    """Part jobs, or the examples of a single one; nothing if there is only one example."""
    if len(group) > 1:
        middle = (len(group) + 1) // 2
        return [group[:middle], group[middle:]]
    return [[(place, half)] for place, part in group for half in part.halves()]


def _count_tokens(group: Group) -> int:
    return sum(lay_out([part for _, part in group]).computed_tokens)


def _does_not_fit(part: MicroBatch) -> TrainingError:
    longest = max(len(example.input_ids) for example in part.examples)
    return TrainingError(
        f"job {part.adapter.name}: one example must fit into memory, one of {longest} tokens does "
        "not; its last good weights are kept; lower train.max_length, set "
        "train.gradient_checkpointing: true, or train fewer jobs at once"
    )
