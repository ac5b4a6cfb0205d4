"""LoRAMoE: LoRA experts on each FFN projection, all mixed by a router; LoRA on attention.

Axes: T tokens, N experts, M samples.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from loraloom.adapters.contract import MAX_NUMBER, Adjustable, Projection
from loraloom.adapters.experts import (
    ExpertCount,
    MixtureConfig,
    RoutedProjection,
    check_has_experts,
)
from loraloom.adapters.lora_projection import LoraProjection
from loraloom.adapters.low_rank import DecomposedConfig
from loraloom.adapters.segment import Records, Samples, SampleTokens
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.routing.losses import AddUp, keep
from loraloom.routing.routes import Dense


class LoraMoeConfig(MixtureConfig, DecomposedConfig):
    """LoRA experts on each FFN projection, all mixed by a router; plain LoRA on attention.

    With weight decomposition the LoRA on attention is a DoRA; experts have none.

    Source: Dou et al. 2023, LoRAMoE, arXiv:2312.09979; files as in moe-peft 2.0.2.
    """

    adds_up_over_ranks = False
    peft_type = "LORAMOE"
    layout = "reference"
    title = "LoRAMoE"
    formula = "y = Wx + s·Σ_e ω_e(x) B_e(A_e x) in the FFN, ω = softmax(Rx)"

    method: Literal["loramoe"] = "loramoe"
    """Mixture of LoRA experts on each FFN projection, all used by every token."""
    num_experts: ExpertCount = 6
    """Experts of each FFN projection."""
    balance_coef: Adjustable[float] = Field(default=0.1, ge=0, le=MAX_NUMBER)
    """Weight of the localized balancing constraint, σ²(Z) / μ(Z): Z are the sums of the experts'
    weights in each sample, times 1 + balance_delta where expert and sample are of one group and
    1 - balance_delta elsewhere."""
    balance_delta: Adjustable[float] = Field(default=0.1, ge=0, lt=1)
    """How far the two groups of experts are to differ; samples have theirs from `expert_group` of
    their data, and the second half of the experts is group 1."""

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        super().check_fits(base_layers)
        check_has_experts(self, base_layers)

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        if not block.is_feed_forward:
            return LoraProjection(base, self, None, dtype, seed)
        config = self.model_copy(update={"weight_decomposition": False})
        return RoutedProjection(base, config, self.num_experts, Dense(), dtype, seed)

    def auxiliary_loss(
        self, routing: Records, samples: Samples = None, add_up: AddUp = keep
    ) -> Tensor | None:
        """Compute the balancing constraint, the mean over routers."""
        if not routing or self.balance_coef == 0:
            return None
        if samples is None:
            samples = [SampleTokens(len(routing[0].router_logits))]
        lengths = [sample.num_tokens for sample in samples]
        # Once for all routers, as a device waits for the copy.
        groups = torch.tensor(
            [sample.expert_group for sample in samples], device=routing[0].router_logits.device
        )
        losses = [
            balancing_constraint(
                layer.router_logits.softmax(-1), lengths, groups, self.balance_delta
            )
            for layer in routing
        ]
        return self.balance_coef * torch.stack(losses).mean()


def balancing_constraint(
    weights: Float[Tensor, "T N"], lengths: Sequence[int], groups: Int[Tensor, "M"], delta: float
) -> Float[Tensor, ""]:
    """Compute σ²(Z) / μ(Z) over experts and samples, Z = I ∘ Q.

    Q[n, m] is the sum of expert n's weights over the tokens of sample m, of which there are
    lengths[m]; groups[m] is the group of the sample. I[n, m] is 1 + δ where
    the expert's group is the sample's, and 1 - δ elsewhere. The second half of the experts is
    group 1.

    Source: Dou et al. 2023, LoRAMoE, arXiv:2312.09979, eq. 5-7.
    """
    by_sample = weights.split(list(lengths))
    sums = torch.stack([weights_of_sample.sum(0) for weights_of_sample in by_sample])
    num_experts = weights.shape[1]
    experts = torch.arange(num_experts, device=weights.device)
    of_experts = experts >= (num_experts + 1) // 2  # (N,)
    is_same = of_experts == groups.to(weights.device).bool().unsqueeze(1)  # (M, N)
    values = torch.where(is_same, (1 + delta) * sums, (1 - delta) * sums)
    # No tokens cost nothing: 0 / tiny in place of 0 / 0.
    smallest = torch.finfo(values.dtype).tiny
    return values.var(correction=0) / values.mean().clamp_min(smallest)
