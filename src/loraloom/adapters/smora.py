"""SMoRA: a LoRA whose ranks are experts; a router chooses among them for each token.

Axes: T tokens, I in_features, R rank, K top_k.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.contract import Projection
from loraloom.adapters.experts import RouterLossConfig, router_on, too_large
from loraloom.adapters.lora_projection import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig
from loraloom.adapters.segment import SegmentTokens
from loraloom.base.blocks import BaseProjection, Block
from loraloom.routing.routes import TopK, router_logits


class SmoraConfig(RouterLossConfig, LowRankConfig):
    """A LoRA whose ranks are experts: y = Wx + s·B(g ∘ A(x)), g from a router over the ranks.

    The paper balances ranks by a bias on the choice that is moved outside of the gradient; here
    the load-balance loss does it, as in all mixtures.

    Source: Zhao et al. 2025, SMoRA, arXiv:2501.15103.
    """

    peft_type = "SMORA"
    title = "SMoRA"
    formula = "y = Wx + s·B(g ∘ Ax), g = softmax(Rx) over the top_k ranks"

    method: Literal["smora"] = "smora"
    """A LoRA whose ranks are experts."""
    rank: int = Field(default=64, ge=1, le=2**10)
    """Ranks of each projection, every one an expert."""
    top_k: int = Field(default=8, ge=1)
    """Ranks that each token uses."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from too_large("top_k", self.top_k, "rank", self.rank)

    @property
    def experts_per_token(self) -> int:
        return self.top_k

    @property
    def experts_per_router(self) -> int:
        return self.rank

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        return SmoraProjection(base, self, dtype, seed)


class SmoraProjection(LoraProjection):
    """A LoRA, and the router that chooses among its ranks."""

    def __init__(self, base: BaseProjection, config: SmoraConfig, dtype: torch.dtype, seed: int):
        super().__init__(base, config, None, dtype, seed)
        self.top_k = config.top_k
        self.router = router_on(base, config.rank, dtype, seed)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh the token's ranks, and zero all others."""
        logits = router_logits(hidden_states, self.router.weight)  # (T, R)
        selected, chosen = TopK(self.top_k)(logits)  # (T, K)
        tokens.record_routing(logits, selected, chosen, self.path)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen)
        return low_rank * weights.to(low_rank.dtype)
