"""MoLA's weights on one projection.

Axes: T tokens, I in_features, E experts, K top_k, R rank, S = E·R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraloom.adapters.adapter import SegmentTokens
from loraloom.adapters.base import BaseProjection
from loraloom.adapters.lora.weights import LoraProjection
from loraloom.adapters.mola.config import MolaConfig
from loraloom.adapters.router import Router
from loraloom.routing.top_k import router_logits, top_k_routing


class MolaProjection(LoraProjection):
    """The LoRA experts of a projection, and the router that chooses among them."""

    maps_rank_space = True
    config: MolaConfig

    def __init__(
        self,
        base: BaseProjection,
        config: MolaConfig,
        num_experts: int,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(base, config, num_experts, dtype, seed)
        self.router = Router(
            f"{self.key}.router",
            (num_experts, base.in_features),
            seed,
            std=None,
            dtype=dtype,
            device=base.device,
        )

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh the columns of the token's experts, and zero all others, [T, S]."""
        logits = router_logits(hidden_states, self.router.weight)
        selected, chosen = top_k_routing(logits, self.config.top_k)
        tokens.record_routing(logits, selected, chosen, self.path)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen)  # (T, E)
        columns = weights.to(low_rank.dtype).repeat_interleave(self.config.rank, dim=1)
        return low_rank * columns
