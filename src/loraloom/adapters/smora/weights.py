"""SMoRA's weights on one projection.

Axes: T tokens, I in_features, O out_features, R rank, K top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraloom.adapters.adapter import SegmentTokens
from loraloom.adapters.base import BaseProjection
from loraloom.adapters.lora.weights import LoraProjection
from loraloom.adapters.router import Router
from loraloom.adapters.smora.config import SmoraConfig
from loraloom.routing.top_k import router_logits, top_k_routing


class SmoraProjection(LoraProjection):
    """A LoRA, and the router that chooses among its ranks."""

    maps_rank_space = True

    def __init__(self, base: BaseProjection, config: SmoraConfig, dtype: torch.dtype, seed: int):
        super().__init__(base, config, None, dtype, seed)
        self.top_k = config.top_k
        shape = (config.rank, base.in_features)
        self.router = Router(f"{self.key}.router", shape, seed, dtype=dtype, device=base.device)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh the token's ranks, and zero all others, [T, R]."""
        logits = router_logits(hidden_states, self.router.weight)
        selected, chosen = top_k_routing(logits, self.top_k)
        tokens.record_routing(logits, selected, chosen, self.path)
        return low_rank * torch.zeros_like(logits).scatter(1, selected, chosen).to(low_rank.dtype)
