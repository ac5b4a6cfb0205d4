"""GOAT: LoRA experts that start from different parts of the base weight's spectrum.

Expert e starts from the R singular directions of W behind the first e·min(I, O)/E. What a router
without a preference would make of all experts' start is taken off again, so that training begins
near the base model:

    y = Wx + s·Σ_e g_e B_e A_e x - s/E·Σ_e B⁰_e A⁰_e x,    s = sqrt(3·eta·I / R)

Source: Fan et al. 2025, Make LoRA Great Again, arXiv:2502.16894; github.com/Facico/GOAT-PEFT, where
the last term is taken off W. Base weights are shared here, so it has a place of its own.

    python recipes/mixture/run.py recipes/methods/recent.yaml \
        --import goat,comol --output runs/methods/recent

Axes: T tokens, I in_features, O out_features, E experts, R rank, S = E·R.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

import loraloom
from loraloom.adapters.experts import ExpertCount, RoutedProjection, RoutingConfig


@loraloom.register_method
class GoatConfig(RoutingConfig):
    """A router and LoRA experts on each linear layer, which start from parts of its spectrum."""

    peft_type = "GOAT"
    title = "GOAT"
    formula = "y = Wx + s·Σ_e g_e B_e A_e x - s/E·Σ_e B⁰_e A⁰_e x"

    method: Literal["goat"] = "goat"
    """LoRA experts that start from singular vectors of the base weight."""
    num_experts: ExpertCount = 8
    """Experts of each projection."""
    eta: float = Field(default=1.0, gt=0)
    """Ratio of the rates of full fine-tuning and of the adapter, in s = sqrt(3·eta·I / rank)."""
    rho: float = Field(default=10.0, gt=0)
    """What the singular values are divided by, besides s."""
    router_loss_scope: Literal["pooled", "per_layer"] = "per_layer"
    """The mean of each router's load-balance loss, or the load over all routers together."""

    @field_validator("alpha", "rank_stabilized", "init")
    @classmethod
    def _check_unused(cls, value: Any, info: Any) -> Any:
        if value != cls.model_fields[info.field_name].default:
            raise ValueError(f"{info.field_name} means nothing in goat, which has eta and rho")
        return value

    def check_fits(self, base_layers):
        super().check_fits(base_layers)
        least = min(min(base.in_features, base.out_features) for base in self.adapted(base_layers))
        if self.num_experts * self.rank > least:
            raise loraloom.AdapterError(
                f"num_experts × rank must be at most {least}, the singular values of the smallest "
                f"projection, got {self.num_experts} × {self.rank}"
            )

    def projection(self, base, block, dtype, seed):
        return GoatProjection(base, self, dtype, seed)


class GoatProjection(RoutedProjection):
    """The experts and the router of a projection, and what the experts were at first."""

    def __init__(self, base, config, dtype, seed):
        capacity = config.expert_capacity
        super().__init__(base, config, config.num_experts, config.route, dtype, seed, capacity)
        self.scaling = math.sqrt(3 * config.eta * base.in_features / config.rank)
        start_A, start_B = starts(base.weight.detach(), config, self.scaling)
        with torch.no_grad():
            self.lora_A.copy_(start_A)
            self.lora_B.copy_(start_B)
        self.start_A = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)  # (E, R, I)
        self.start_B = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)  # (E, O, R)

    def compute_B(self, dtype):
        both = torch.cat([self.lora_B, self.start_B / -len(self.start_B)])  # (2E, O, R)
        return (self.scaling * both).transpose(1, 2).flatten(0, 1).to(dtype)  # (2S, O)

    def between(self, low_rank, hidden_states, tokens):
        # The start belongs to the base's weight, which dropout leaves alone.
        start_A = self.start_A.flatten(0, 1).to(low_rank.dtype)
        start = hidden_states.to(low_rank.dtype) @ start_A.T
        return torch.cat([super().between(low_rank, hidden_states, tokens), start], 1)

    def tensors(self):
        yield from super().tensors()
        for expert in range(len(self.start_A)):
            yield f"{self.key}.experts.{expert}.start_A", self.start_A.detach()[expert]
            yield f"{self.key}.experts.{expert}.start_B", self.start_B.detach()[expert]


def starts(weight, config, scaling):
    """Give A = sqrt(Σ/(s·rho)) Vᵀ and B = U sqrt(Σ/(s·rho)) of each expert's part of W = U Σ Vᵀ."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    roots = (values / (scaling * config.rho)).sqrt()
    distance = len(values) // config.num_experts
    begins = [expert * distance for expert in range(config.num_experts)]
    pieces = [slice(begin, begin + config.rank) for begin in begins]
    start_A = torch.stack([roots[one, None] * right[one] for one in pieces])
    return start_A, torch.stack([left[:, one] * roots[one] for one in pieces])
