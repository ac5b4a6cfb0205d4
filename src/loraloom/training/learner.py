"""A learner: an adapter, the optimizer of its weights and, in float16, the scale of its losses.

A `Job` is one with data and a schedule, a `TrainingClient` one that its caller drives.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.nn.utils import clip_grad_norm_

from loraloom.adapters.contract import Adapter
from loraloom.training.settings import OptimizerConfig
from loraloom.training.step import optimizers
from loraloom.training.step.optimizers import LossScale


class Learner:
    """An adapter that is trained; steps are the caller's to count."""

    def __init__(
        self, adapter: Adapter, config: OptimizerConfig, loss_scale: LossScale | None = None
    ):
        self.adapter = adapter
        self.config = config
        self.loss_scale = loss_scale
        parameters = adapter.named_parameters()
        self.parameters = {name: weight for name, weight in parameters if weight.requires_grad}
        self.optimizer = optimizers.build_optimizer(config, adapter)

    @property
    def num_trained(self) -> int:
        frozen = optimizers.frozen_tensors(self.config, self.adapter)
        num_parameters = sum(parameter.numel() for parameter in self.parameters.values())
        return num_parameters - sum(tensor.numel() for tensor in frozen)

    @property
    def learning_rate(self) -> float:
        """The learning rate without the ratios of groups, such as LoRA+'s."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["lr_ratio"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]

    @property
    def loss_factor(self) -> float:
        """The factor of the loss in a backward pass."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def clip_gradients(self, max_grad_norm: float | None) -> tuple[float, bool]:
        """Clip the gradients; return their norm before, and whether it overflows float16."""
        if self.loss_scale is not None:
            self.loss_scale.unscale(self.parameters.values())
        optimizers.drop_frozen_gradients(self.config, self.adapter)
        max_norm = math.inf if max_grad_norm is None else max_grad_norm
        norm = float(clip_grad_norm_(self.parameters.values(), max_norm))
        overflows = self.loss_scale is not None and not self.loss_scale.takes(norm)
        return norm, overflows

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
            "loss_scale": None if self.loss_scale is None else asdict(self.loss_scale),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Older states of clients have the weights that aren't trained, too.
        weights = [state["weights"][name] for name in self.parameters]
        optimizers.copy_all(self.parameters.values(), weights)
        for name, parameter in self.parameters.items():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.loss_scale is not None:
            self.loss_scale = LossScale(**state["loss_scale"])
