"""DynMoLE's routing and losses; its weights are those of any mixture on single projections.

Axes: T tokens, E experts, K slots of a token (all experts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraloom.adapters.adapter import SampleTokens
from loraloom.adapters.dynmole.config import DynMoleConfig
from loraloom.adapters.low_rank import LowRankAdapter
from loraloom.routing.losses import AddUp, whole
from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import Hybrid, tsallis_entropy


class DynMoleAdapter(LowRankAdapter):
    """Experts on each projection, with losses on entropy and load."""

    config: DynMoleConfig

    def auxiliary_loss(
        self,
        routing: Sequence[LayerRouting],
        samples: Sequence[SampleTokens] | None = None,
        add_up: AddUp = whole,
    ) -> Tensor | None:
        """Compute both losses over the tokens of all routers together."""
        if not routing:
            return None
        logits = torch.cat([layer.router_logits for layer in routing])
        selected = torch.cat([layer.selected_experts for layer in routing])
        weights = torch.cat([layer.routing_weights for layer in routing])
        probabilities, config = logits.softmax(-1), self.config
        entropy = tsallis_entropy(probabilities, config.entropy_index, config.entropy_eps)
        mean_entropy = entropy.sum() / max(1, len(logits))
        return (
            config.router_entropy_loss_coef * mean_entropy
            + config.router_aux_loss_coef * weight_balance_loss(probabilities, selected, weights)
        )


def route_of(config: DynMoleConfig) -> Hybrid:
    """Return what routers do with their logits."""
    return Hybrid(
        config.top_p,
        config.keep_top_k,
        config.entropy_index,
        config.entropy_threshold,
        config.entropy_eps,
    )


def weight_balance_loss(
    probabilities: Float[Tensor, "T E"],
    selected_experts: Int[Tensor, "T K"],
    routing_weights: Float[Tensor, "T K"],
) -> Float[Tensor, ""]:
    """Compute `E · Σ_n w[n] · P[n]`: w is an expert's mean weight, P its mean probability.

    Source: DynMoLE's code, `_dynamic_load_balancing_loss_func`.
    """
    weights = torch.zeros_like(probabilities).scatter(1, selected_experts, routing_weights)
    num_tokens = max(1, len(probabilities))
    return probabilities.shape[1] * (weights.sum(0) * probabilities.sum(0)).sum() / num_tokens**2
