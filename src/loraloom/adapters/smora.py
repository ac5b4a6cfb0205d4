"""SMoRA: a LoRA whose ranks are experts; a router chooses among them for each token."""

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from loraloom.adapters.contract import Projection
from loraloom.adapters.experts import RoutedProjection, RouterLossConfig, too_large
from loraloom.adapters.low_rank import LowRankConfig
from loraloom.base.blocks import BaseProjection, Block
from loraloom.routing.routes import TopK


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
        return RoutedProjection(base, self, None, TopK(self.top_k), dtype, seed)
