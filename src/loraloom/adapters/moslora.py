"""MoSLoRA: a LoRA with a trained mixer M of its subspaces between A and B.

`B(M(Ax))` is the LoRA with A and `B M`, so all forms of a LoRA serve.

Axes: O out_features, R rank.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Adjustable, Projection
from loraloom.adapters.lora_projection import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig, generator_for, initial_weight
from loraloom.base.blocks import BaseProjection, Block


class MosLoraConfig(LowRankConfig):
    """Mixture of subspaces: y = Wx + bias + scaling · B M A(dropout(x)).

    Source: Wu et al. 2024, Mixture-of-Subspaces in Low-Rank Adaptation, arXiv:2406.11909.
    """

    peft_type = "MOSLORA"
    title = "MoSLoRA"
    formula = "y = Wx + scaling · B M A x"

    method: Literal["moslora"] = "moslora"
    """A LoRA with a trained mixer M between A and B."""
    mixer_init: Adjustable[Literal["kaiming", "orthogonal"]] = "kaiming"
    """How M starts: Kaiming uniform with a = sqrt(5), or a random orthogonal matrix."""

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        return MosLoraProjection(base, self, dtype, seed)


class MosLoraProjection(LoraProjection):
    """A LoRA with a mixer M, [R, R], behind its B."""

    def __init__(self, base: BaseProjection, config: MosLoraConfig, dtype: torch.dtype, seed: int):
        super().__init__(base, config, None, dtype, seed)
        name = f"{self.key}.mixer"
        mixer = initial_weight((config.rank, config.rank), seed, name)
        if config.mixer_init == "orthogonal":
            nn.init.orthogonal_(mixer, generator=generator_for(seed, name))
        self.mixer = nn.Parameter(mixer.to(dtype=dtype, device=base.device))

    def _all_B(self) -> Tensor:
        return self.lora_B @ self.mixer  # (1, O, R)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors()
        yield f"{self.key}.mixer", self.mixer.detach()
