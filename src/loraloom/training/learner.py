"""A learner: an adapter, the optimizer of its weights and, in float16, the scale of its losses.

A `Job` is one with data and a schedule, a `TrainingClient` one that its caller drives.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from loraloom.adapters.contract import Adapter
from loraloom.training.settings import OptimizerConfig
from loraloom.training.step import optimizers


class Learner:
    """An adapter that is trained; steps are the caller's to count."""

    def __init__(self, adapter: Adapter, config: OptimizerConfig, scaler: GradScaler):
        self.adapter = adapter
        self.config = config
        self.scaler = scaler
        self.skipped_steps = 0
        parameters = adapter.named_parameters()
        self.parameters = {name: weight for name, weight in parameters if weight.requires_grad}
        self.optimizer = optimizers.build_optimizer(config, adapter)

    @property
    def num_trained(self) -> int:
        return optimizers.count_trained(self.config, self.adapter)

    @property
    def learning_rate(self) -> float:
        """The learning rate without the ratios of groups, such as LoRA+'s."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["lr_ratio"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_ratio"]

    def clip_gradients(self, max_grad_norm: float | None) -> tuple[float, bool]:
        """Clip the gradients; return their norm before, and whether it overflows float16."""
        optimizers.drop_frozen_gradients(self.config, self.adapter)
        self.scaler.unscale_(self.optimizer)
        max_norm = math.inf if max_grad_norm is None else max_grad_norm
        norm = float(clip_grad_norm_(self.parameters.values(), max_norm))
        overflows = self.scaler.is_enabled() and not math.isfinite(norm)
        if overflows:
            self.scaler.update()
            self.skipped_steps += 1
        return norm, overflows

    def apply(self) -> None:
        """Let the optimizer make a step; each tensor has the learning rate of `lr_ratios`."""
        with optimizers.rates_of_their_own(self.config, self.adapter):
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Free what training needs; the weights stay."""
        self.zero_grad()
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        weights = self.parameters.items()
        loss_scale = None
        if self.scaler.is_enabled():
            loss_scale = {
                "scale": self.scaler.get_scale(),
                "sound_steps": self.scaler.state_dict()["_growth_tracker"],
                "skipped_steps": self.skipped_steps,
            }
        return {
            "weights": {name: weight.detach() for name, weight in weights},
            "gradients": {name: w.grad for name, w in weights if w.grad is not None},
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": loss_scale,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # Older states of clients have the weights that aren't trained, too.
        weights = [state["weights"][name] for name in self.parameters]
        optimizers.copy_all(self.parameters.values(), weights)
        for name, parameter in self.parameters.items():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.to(parameter)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            loss_scale = state["loss_scale"]
            changes = {"scale": loss_scale["scale"], "_growth_tracker": loss_scale["sound_steps"]}
            self.scaler.load_state_dict(self.scaler.state_dict() | changes)
            self.skipped_steps = loss_scale["skipped_steps"]
