"""Loss scaling for a base model in float16, whose gradients would become zero or infinite.

Each job has a scale of its own: its loss is multiplied by it before the backward pass, and its
gradients, which are in float32, are divided by it before they are clipped. So a job whose gradients
overflow skips a step, and the others know nothing of it.

Source:
    PyTorch's `torch.amp.GradScaler`: the same rule with the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import Parameter

from loraloom.models.host import Host

GROWTH_INTERVAL = 2000
"""Steps in a row without an overflow after which the scale is doubled."""


@dataclass
class LossScale:
    """A job's scale. An overflow halves it.

    Args:
        scale: A power of two, so that it changes no digit.
        sound_steps: Since the scale was changed.
        skipped_steps: Of the whole job.
    """

    scale: float = 2.0**16
    sound_steps: int = 0
    skipped_steps: int = 0

    def unscale(self, parameters: Iterable[Parameter]) -> None:
        """Divide the gradients of a whole step by the scale."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)  # pyright: ignore

    def takes(self, grad_norm: float) -> bool:
        """Say whether to make a step, by the norm of its gradient, and adapt the scale."""
        if not math.isfinite(grad_norm):
            self.scale /= 2
            self.sound_steps = 0
            self.skipped_steps += 1
            return False
        self.sound_steps += 1
        if self.sound_steps == GROWTH_INTERVAL:
            self.scale *= 2
            self.sound_steps = 0
        return True


def make_loss_scale(host: Host) -> LossScale | None:
    """Make the scale of a job; None where the base model's number format needs none."""
    return LossScale() if host.dtype == torch.float16 else None
