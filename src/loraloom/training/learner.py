"""A learner: an adapter, the optimizer of its weights and, in float16, the scale of its losses.

A `Job` is one with data and a schedule, a `TrainingClient` one that its caller drives.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from loraloom.adapters.contract import Adapter
from loraloom.training.settings import OptimizerConfig
from loraloom.training.step import optimizers


@dataclass
class LossScale:
    """Factor of an adapter's losses in float16, by which its gradients neither vanish nor overflow.

    It changes as in `torch.amp.GradScaler`, but on the host, which waits for no device to read it.
    """

    scale: float
    sound_steps: int = 0  # since the scale has changed
    skipped_steps: int = 0

    def update(self, grad_norm: float) -> bool:
        """Return whether the gradient overflows, so that its step is to be skipped."""
        self.sound_steps += 1
        if not math.isfinite(grad_norm):
            self.scale /= 2
            self.sound_steps = 0
            self.skipped_steps += 1
        elif self.sound_steps == 2000:
            self.scale *= 2
            self.sound_steps = 0
        return not math.isfinite(grad_norm)


class Learner:
    """An adapter that is trained; steps are the caller's to count."""

    def __init__(self, adapter: Adapter, config: OptimizerConfig, dtype: torch.dtype):
        self.adapter = adapter
        self.config = config
        self.scales_losses = dtype == torch.float16
        self.loss_scale = LossScale(2.0**16 if self.scales_losses else 1.0)
        parameters = adapter.named_parameters()
        self.parameters = {name: weight for name, weight in parameters if weight.requires_grad}
        self.optimizer = optimizers.build_optimizer(config, adapter)

    @property
    def learning_rate(self) -> float:
        """The learning rate without the ratios of groups, such as LoRA+'s."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["lr_ratio"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]

    def clip_gradient(self, max_grad_norm: float | None) -> Tensor:
        """Clip the gradient; return its norm before, on the device."""
        optimizers.drop_frozen_gradients(self.config, self.adapter)
        weights = self.parameters.values()
        if self.scales_losses:
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)
        max_norm = math.inf if max_grad_norm is None else max_grad_norm
        return clip_grad_norm_(weights, max_norm)

    def overflows(self, grad_norm: float) -> bool:
        """Return whether a step overflows float16 and is to be skipped; the scale follows."""
        return self.scales_losses and self.loss_scale.update(grad_norm)

    def apply(self) -> None:
        """Let the optimizer make a step; each tensor has the learning rate of `lr_ratios`."""
        with optimizers.rates_of_their_own(self.config, self.adapter):
            self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Free what training needs; the weights stay."""
        self.zero_grad()
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        weights = self.parameters.items()
        return {
            "weights": {name: weight.detach() for name, weight in weights},
            "gradients": {name: w.grad for name, w in weights if w.grad is not None},
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": asdict(self.loss_scale) if self.scales_losses else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Older states of clients have the weights that aren't trained, too.
        weights = [state["weights"][name] for name in self.parameters]
        optimizers.copy_all(self.parameters.values(), weights)
        for name, parameter in self.parameters.items():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scales_losses:
            self.loss_scale = LossScale(**state["loss_scale"])
