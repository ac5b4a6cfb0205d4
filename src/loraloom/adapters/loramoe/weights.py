"""LoRAMoE's weights and its localized balancing constraint.

Axes: T tokens, N experts, M samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.adapters.adapter import SampleTokens
from loraloom.adapters.base import BaseLayer, BaseProjection
from loraloom.adapters.lora.weights import LoraProjection
from loraloom.adapters.loramoe.config import LoraMoeConfig
from loraloom.adapters.low_rank import LowRankAdapter, Projection
from loraloom.adapters.routed import RoutedProjection
from loraloom.routing.losses import AddUp, whole
from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import Dense


class LoraMoeAdapter(LowRankAdapter):
    """Experts on FFN projections, a LoRA on attention's."""

    config: LoraMoeConfig

    def auxiliary_loss(
        self,
        routing: Sequence[LayerRouting],
        samples: Sequence[SampleTokens] | None = None,
        add_up: AddUp = whole,
    ) -> Tensor | None:
        """Compute the balancing constraint, the mean over routers."""
        config = self.config
        if not routing or config.balance_coef == 0:
            return None
        if samples is None:
            samples = [SampleTokens(len(routing[0].router_logits))]
        losses = [
            balancing_constraint(layer.router_logits.softmax(-1), samples, config.balance_delta)
            for layer in routing
        ]
        return config.balance_coef * torch.stack(losses).mean()


def projection_builder(
    config: LoraMoeConfig, dtype: torch.dtype, seed: int
) -> Callable[[BaseProjection, BaseLayer], Projection]:
    """Return what makes the weights on a projection."""
    expert_config = config.model_copy(update={"weight_decomposition": False})

    def build(base: BaseProjection, layer: BaseLayer) -> Projection:
        if base.key.split(".")[2] != layer.ffn_block:
            return LoraProjection(base, config, None, dtype, seed)
        return RoutedProjection(base, expert_config, config.num_experts, Dense(), dtype, seed)

    return build


def balancing_constraint(
    weights: Float[Tensor, "T N"], samples: Sequence[SampleTokens], delta: float
) -> Float[Tensor, ""]:
    """Compute σ²(Z) / μ(Z) over experts and samples, Z = I ∘ Q.

    Q[n, m] is the sum of expert n's weights over the tokens of sample m; I[n, m] is 1 + δ where
    the expert's group is the sample's, and 1 - δ elsewhere. The second half of the experts is
    group 1.

    Source:
        Dou et al. 2023, LoRAMoE, arXiv:2312.09979, eq. 5-7.
    """
    sums = torch.stack([part.sum(0) for part in weights.split([s.num_tokens for s in samples])])
    num_experts = weights.shape[1]
    groups = torch.arange(num_experts, device=weights.device) >= (num_experts + 1) // 2
    of_samples = torch.tensor([s.expert_group for s in samples], device=weights.device)
    is_own = groups.unsqueeze(0) == of_samples.unsqueeze(1).bool()
    values = torch.where(is_own, (1 + delta) * sums, (1 - delta) * sums)  # (M, N)
    mean = values.mean().clamp_min(torch.finfo(values.dtype).tiny)  # no tokens cost nothing
    return values.var(correction=0) / mean
