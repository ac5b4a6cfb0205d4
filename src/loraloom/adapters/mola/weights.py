"""MoLA's weights on one projection.

Axes: T tokens, I in_features, O out_features, E experts, K top_k, R rank, S = E·R.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import SegmentTokens
from loraloom.adapters.base import BaseProjection
from loraloom.adapters.low_rank import Projection, initial_A
from loraloom.adapters.mola.config import MolaConfig
from loraloom.adapters.router import Router
from loraloom.routing.top_k import router_logits, top_k_routing


class MolaProjection(Projection):
    """A and B of all experts, and the router that chooses among them."""

    maps_rank_space = True

    def __init__(
        self,
        base: BaseProjection,
        config: MolaConfig,
        num_experts: int,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(base)
        self.config = config
        options = {"dtype": dtype, "device": base.device}
        names = [f"{self.key}.experts.{expert}.lora_A" for expert in range(num_experts)]
        shape = (config.rank, base.in_features)
        initial = torch.stack([initial_A(shape, config.init, seed, name) for name in names])
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(num_experts, base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        router_shape = (num_experts, base.in_features)
        self.router = Router(f"{self.key}.router", router_shape, seed, std=None, **options)

    @property
    def num_columns(self) -> int:
        """S."""
        return len(self.lora_A) * self.config.rank

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A of all experts, [S, I]."""
        return self.lora_A.flatten(0, 1).to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B of all experts times scaling, [S, O]."""
        return (self.lora_B * self.config.scaling).transpose(1, 2).flatten(0, 1).to(dtype)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh the columns of the token's experts, and zero all others, [T, S]."""
        logits = router_logits(hidden_states, self.router.weight)
        selected, chosen = top_k_routing(logits, self.config.top_k)
        tokens.record_routing(logits, selected, chosen, self.path)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen)  # (T, E)
        columns = weights.to(low_rank.dtype).repeat_interleave(self.config.rank, dim=1)
        return low_rank * columns

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each expert's A and B; the router yields its own."""
        for expert in range(len(self.lora_A)):
            yield f"{self.key}.experts.{expert}.lora_A", self.lora_A.detach()[expert]
            yield f"{self.key}.experts.{expert}.lora_B", self.lora_B.detach()[expert]
