"""LoRA experts on one projection, and a router of the projection's own.

Axes: T tokens, I in_features, E experts, K slots of a token, R rank, S = E·R.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraloom.adapters.adapter import SegmentTokens
from loraloom.adapters.base import BaseProjection
from loraloom.adapters.config import LowRankConfig
from loraloom.adapters.lora.weights import LoraProjection
from loraloom.adapters.router import Router
from loraloom.routing.routes import Route
from loraloom.routing.top_k import router_logits


class RoutedProjection(LoraProjection):
    """The LoRA experts of a projection, and the router that chooses among them.

    Args:
        base: The projection that is adapted.
        config: Rank, scaling, initialisation.
        num_experts: E.
        route: What the router does with its logits.
        dtype: Of the trained weights, at least float32.
        seed: Of the job.
        capacity: Tokens of a sample that an expert takes in training; None for any number.
    """

    maps_rank_space = True

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_experts: int,
        route: Route,
        dtype: torch.dtype,
        seed: int,
        capacity: int | None = None,
    ):
        super().__init__(base, config, num_experts, dtype, seed)
        self.route = route
        self.capacity = capacity
        shape = (num_experts, base.in_features)
        self.router = Router(f"{self.key}.router", shape, seed, dtype=dtype, device=base.device)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh the columns of the token's experts, and zero all others, [T, S]."""
        logits = router_logits(hidden_states, self.router.weight)
        selected, chosen = self.route(logits)
        tokens.record_routing(logits, selected, chosen, self.path)
        beyond = tokens.beyond_capacity(selected, self.capacity)
        if beyond is not None:
            chosen = chosen.masked_fill(beyond, 0)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen)  # (T, E)
        columns = weights.to(low_rank.dtype).repeat_interleave(self.config.rank, dim=1)
        return low_rank * columns
