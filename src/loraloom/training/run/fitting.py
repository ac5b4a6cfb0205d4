"""Fused steps that fail: one that runs out of memory or raises is done again in parts.

Jobs are parted first, which changes nothing for any of them. A job that is alone when memory runs
out has its micro-batch halved, example by whole example, down to one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from loraloom.errors import TrainingError
from loraloom.infer.halving import free_memory
from loraloom.models.host import Host
from loraloom.training.step.fused import forward_backward
from loraloom.training.step.micro_batch import MicroBatch, MicroBatchLoss
from loraloom.training.step.rows import lay_out

_log = logging.getLogger(__name__)

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
            The losses in their order; an error for each job of which one example doesn't fit, or
            that raises when it is alone.

        Raises:
            Exception: If all jobs raise, and the base model does without any.
        """
        faults: list[Exception] = []
        outcomes: list[MicroBatchLoss | TrainingError] = [MicroBatchLoss(0.0)] * len(micro_batches)
        waiting: list[Group] = [list(enumerate(micro_batches))]
        while waiting:
            group = [one for one in waiting.pop() if not isinstance(outcomes[one[0]], Exception)]
            if not group:
                continue
            halves = _halves(group)
            if halves and self._is_too_large(group):
                waiting += halves[::-1]
                continue
            try:
                losses = self._attempt([part for _, part in group])
            except Exception as error:
                if len(group) > 1:
                    waiting += halves[::-1]
                    continue
                faults.append(error)
                outcomes[group[0][0]] = _fault(group[0][1], error)
                continue
            if losses is not None:
                for (place, _), loss in zip(group, losses, strict=True):
                    outcomes[place] += loss  # pyright: ignore[reportOperatorIssue]
            elif halves:
                self.max_tokens = max(map(_count_tokens, halves))
                waiting += halves[::-1]
            else:
                outcomes[group[0][0]] = _does_not_fit(group[0][1])
        if faults and len(faults) == len(micro_batches):
            self.raise_if_general(faults[0])
        return outcomes

    def raise_if_general(self, fault: Exception) -> None:
        """Raise a fault again if the base model has it too: a device that is gone, say."""
        one_token = torch.full((1, 1), self._pad_id, device=self._host.device)
        try:
            with torch.no_grad():
                self._host.hidden(one_token)
        except Exception:
            raise fault from None

    def _is_too_large(self, group: Group) -> bool:
        return self.max_tokens is not None and _count_tokens(group) > self.max_tokens

    def _attempt(self, parts: Sequence[MicroBatch]) -> list[MicroBatchLoss] | None:
        """Add the gradients of a forward; None if memory runs out.

        If it does, or an exception is raised, gradients are as before: what is there already is
        set aside meanwhile, as a backward pass may end half-way.
        """
        weights = [weight for part in parts for weight in part.adapter.parameters()]
        before = [weight.grad for weight in weights]
        _set_gradients(weights, [None] * len(weights))
        try:
            losses = forward_backward(self._host, parts, self._pad_id)
        except torch.OutOfMemoryError:
            losses = None
        except Exception:
            _set_gradients(weights, before)
            raise
        if losses is None:  # the error, which holds on to the activations, is gone by now
            _set_gradients(weights, before)
            free_memory()
            return None
        for weight, gradient in zip(weights, before, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)
        return losses


def _set_gradients(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def _halves(group: Group) -> list[Group]:
    """Part jobs, or the examples of a single one; nothing if there is only one example."""
    if len(group) > 1:
        middle = (len(group) + 1) // 2
        return [group[:middle], group[middle:]]
    return [[(place, half)] for place, part in group for half in part.halves()]


def _count_tokens(group: Group) -> int:
    return sum(lay_out([part for _, part in group]).computed_tokens)


def _fault(part: MicroBatch, error: Exception) -> TrainingError:
    if isinstance(error, TrainingError):
        return error
    _log.error("job %s failed", part.adapter.name, exc_info=error)
    return TrainingError(
        f"job {part.adapter.name}: its forward or backward pass raised {type(error).__name__}: "
        f"{error}; its last good weights are kept"
    )


def _does_not_fit(part: MicroBatch) -> TrainingError:
    longest = max(len(example.input_ids) for example in part.examples)
    return TrainingError(
        f"job {part.adapter.name}: one example must fit into memory, one of {longest} tokens does "
        "not; its last good weights are kept; lower train.max_length, set "
        "train.gradient_checkpointing: true, or train fewer jobs at once"
    )
