"""DynMoLE: LoRA experts on each projection, more of them where a router is undecided.

Axes: T tokens, E experts, K slots of a token (all experts).
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.contract import MAX_NUMBER, Adjustable, Projection
from loraloom.adapters.experts import ExpertCount, MixtureConfig, RoutedProjection, too_large
from loraloom.adapters.segment import Records, Samples
from loraloom.base.blocks import BaseProjection, Block
from loraloom.routing.losses import AddUp, keep
from loraloom.routing.routes import Hybrid, tsallis_entropy


class DynMoleConfig(MixtureConfig):
    """A router and LoRA experts on each projection; all are used where the router is undecided.

    Source: Li et al. 2025, DynMoLE, arXiv:2504.00661; settings, defaults and names in files as in
    its code, github.com/mikecovlee/DynMoLE.
    """

    adds_up_over_ranks = False
    peft_type = "DYNMOLE"
    layout = "reference"
    title = "DynMoLE"
    formula = "y = Wx + s·Σ_e ω_e B_e(A_e x), ω = p, of low entropy cut to top_p"

    method: Literal["dynmole"] = "dynmole"
    """Mixture of LoRA experts whose number depends on the router's entropy."""
    num_experts: ExpertCount = 8
    """Experts of each projection."""
    keep_top_k: int = Field(default=2, ge=1)
    """Experts that each token uses at least."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """A token uses the most probable experts while they sum to at most this."""
    entropy_threshold: float = Field(default=0.9, gt=0, le=1)
    """Tsallis entropy of the probabilities, as a share of its maximum, above which a token uses all
    experts."""
    entropy_index: float = Field(default=1.1, gt=0, le=2)
    """q of the Tsallis entropy; 1 is Shannon's."""
    entropy_eps: float = Field(default=1e-5, gt=0, le=1)
    """Added to each probability in the entropy."""
    router_entropy_loss_coef: Adjustable[float] = Field(default=0.01, ge=0, le=MAX_NUMBER)
    """Weight of the mean entropy, which makes routers decide."""
    router_aux_loss_coef: Adjustable[float] = Field(default=0.001, ge=0, le=MAX_NUMBER)
    """Weight of the load-balance loss."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from too_large("keep_top_k", self.keep_top_k, "num_experts", self.num_experts)

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        route = Hybrid(
            self.top_p,
            self.keep_top_k,
            self.entropy_index,
            self.entropy_threshold,
            self.entropy_eps,
        )
        return RoutedProjection(base, self, self.num_experts, route, dtype, seed)

    def auxiliary_loss(
        self, routing: Records, samples: Samples = None, add_up: AddUp = keep
    ) -> Tensor | None:
        """Compute the losses on entropy and load, over the tokens of all routers together."""
        if not routing:
            return None
        logits = torch.cat([layer.router_logits for layer in routing])  # (T, E)
        selected = torch.cat([layer.selected_experts for layer in routing])  # (T, K)
        weights = torch.cat([layer.routing_weights for layer in routing])  # (T, K)
        p = logits.softmax(-1)
        num_tokens = max(1, len(p))
        entropies = tsallis_entropy(p, self.entropy_index, self.entropy_eps)
        entropy = entropies.sum() / num_tokens
        # E · Σ_n w[n] · P[n], of an expert's mean weight and mean probability, as in its code
        # (`_dynamic_load_balancing_loss_func`).
        of_experts = torch.zeros_like(p).scatter(1, selected, weights)  # (T, E)
        products = of_experts.sum(0) * p.sum(0)
        balance = p.shape[1] * products.sum() / num_tokens**2
        return self.router_entropy_loss_coef * entropy + self.router_aux_loss_coef * balance
