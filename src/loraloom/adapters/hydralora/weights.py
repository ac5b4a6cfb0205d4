"""HydraLoRA's weights on one projection.

Axes: T tokens, I in_features, O out_features, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import SegmentTokens
from loraloom.adapters.base import BaseProjection
from loraloom.adapters.hydralora.config import HydraLoraConfig
from loraloom.adapters.low_rank import Projection, initial_A
from loraloom.adapters.router import Router
from loraloom.routing.top_k import router_logits


class HydraLoraProjection(Projection):
    """A, E times B, and the router that mixes them."""

    maps_rank_space = True

    def __init__(
        self, base: BaseProjection, config: HydraLoraConfig, dtype: torch.dtype, seed: int
    ):
        super().__init__(base)
        self.scaling = config.scaling
        options = {"dtype": dtype, "device": base.device}
        shape = (config.rank, base.in_features)
        initial = initial_A(shape, config.init, seed, f"{self.key}.lora_A")
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(config.num_experts, base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        router_shape = (config.num_experts, base.in_features)
        self.router = Router(f"{self.key}.router", router_shape, seed, **options)

    @property
    def num_columns(self) -> int:
        """R."""
        return len(self.lora_A)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A, [R, I]."""
        return self.lora_A.to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """All B behind one another, [E·R, O]."""
        return (self.lora_B * self.scaling).transpose(1, 2).flatten(0, 1).to(dtype)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh a copy of Ax for each B, [T, E·R]."""
        logits = router_logits(hidden_states, self.router.weight)
        weights = logits.softmax(-1)  # (T, E)
        if tokens.record is not None:
            best_first = weights.sort(-1, descending=True)
            tokens.record_routing(logits, best_first.indices, best_first.values, self.path)
        return (weights.to(low_rank.dtype).unsqueeze(2) * low_rank.unsqueeze(1)).flatten(1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield A and each B; the router yields its own."""
        yield f"{self.key}.lora_A", self.lora_A.detach()
        for expert, lora_B in enumerate(self.lora_B.detach()):
            yield f"{self.key}.experts.{expert}.lora_B", lora_B
