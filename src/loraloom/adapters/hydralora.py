"""HydraLoRA: one A, several B, and a router on each adapted projection.

Axes: T tokens, I in_features, O out_features, E experts, R rank.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Projection
from loraloom.adapters.experts import ExpertCount, MixtureConfig, router_on
from loraloom.adapters.lora_projection import LoraProjection
from loraloom.adapters.segment import SegmentTokens
from loraloom.base.blocks import BaseProjection, Block
from loraloom.routing.routes import router_logits


class HydraLoraConfig(MixtureConfig):
    """One A, several B, all mixed by a router: y = Wx + s·Σ_e softmax(router(x))_e B_e(A(x)).

    Source: Tian et al. 2024, HydraLoRA, arXiv:2404.19245, eq. 4-5.
    """

    peft_type = "HYDRALORA"
    title = "HydraLoRA"
    formula = "y = Wx + s·Σ_e ω_e(x) B_e(Ax), ω = softmax(Rx)"

    method: Literal["hydralora"] = "hydralora"
    """A shared A and a mixture of B on each linear layer."""
    num_experts: ExpertCount = 3
    """Matrices B of each projection."""

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        return HydraLoraProjection(base, self, dtype, seed)


class HydraLoraProjection(LoraProjection):
    """A LoRA with E times B, and the router that mixes them."""

    def __init__(
        self, base: BaseProjection, config: HydraLoraConfig, dtype: torch.dtype, seed: int
    ):
        super().__init__(base, config, None, dtype, seed)
        zeros = self.lora_B.detach()
        self.lora_B = nn.Parameter(zeros.repeat(config.num_experts, 1, 1))
        self.router = router_on(base, config.num_experts, dtype, seed)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh a copy of Ax for each B."""
        logits = router_logits(hidden_states, self.router.weight)
        weights = logits.softmax(-1)  # (T, E)
        # Only the record needs an order, and sorting takes longer than the softmax.
        if tokens.record is not None:
            best_first = weights.sort(-1, descending=True)
            tokens.record_routing(logits, best_first.indices, best_first.values, self.path)
        copies = weights.to(low_rank.dtype).unsqueeze(2) * low_rank.unsqueeze(1)  # (T, E, R)
        return copies.flatten(1)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.key}.lora_A", self.lora_A.detach()[0]
        for expert, lora_B in enumerate(self.lora_B.detach()):
            yield f"{self.key}.experts.{expert}.lora_B", lora_B
