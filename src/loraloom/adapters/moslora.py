"""MoSLoRA: a LoRA with a trained mixer M of its subspaces between A and B.

`B(M(Ax))` is the LoRA with A and `B M`, so all forms of a LoRA serve.

Axes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from loraloom.adapters.base import BaseLayer, BaseProjection
from loraloom.adapters.low_rank import LowRankConfig, generator_for, initial_A, kaiming_uniform
from loraloom.adapters.method import Free, Projection


class MosLoraConfig(LowRankConfig):
    """Mixture of subspaces: y = Wx + bias + scaling · B M A(dropout(x)).

    Source: Wu et al. 2024, Mixture-of-Subspaces in Low-Rank Adaptation, arXiv:2406.11909.
    """

    peft_type = "MOSLORA"
    title = "MoSLoRA"
    formula = "y = Wx + scaling · B M A x"

    method: Literal["moslora"] = "moslora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """A LoRA with a trained mixer M between A and B."""
    mixer_init: Free[Literal["kaiming", "orthogonal"]] = "kaiming"
    """How M starts: Kaiming uniform with a = sqrt(5), or a random orthogonal matrix."""

    def projection(
        self, base: BaseProjection, layer: BaseLayer, dtype: torch.dtype, seed: int
    ) -> Projection:
        return MosLoraProjection(base, self, dtype, seed)


class MosLoraProjection(Projection):
    """A, [R, I], M, [R, R], and B, [O, R], on a projection; B starts at zero."""

    def __init__(self, base: BaseProjection, config: MosLoraConfig, dtype: torch.dtype, seed: int):
        super().__init__(base)
        rank, options = config.rank, {"dtype": dtype, "device": base.device}
        lora_A = initial_A((rank, base.in_features), config.init, seed, f"{self.key}.lora_A")
        mixer = kaiming_uniform((rank, rank), seed, f"{self.key}.mixer")
        if config.mixer_init == "orthogonal":
            generator = generator_for(seed, f"{self.key}.mixer")
            nn.init.orthogonal_(mixer, generator=generator)
        self.lora_A = nn.Parameter(lora_A.to(**options))
        self.mixer = nn.Parameter(mixer.to(**options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        self.scaling = config.scaling

    @property
    def num_columns(self) -> int:
        return len(self.lora_A)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        return self.lora_A.to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        return (self.scaling * (self.lora_B @ self.mixer).T).to(dtype)  # (R, O)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.key}.lora_A", self.lora_A.detach()
        yield f"{self.key}.mixer", self.mixer.detach()
        yield f"{self.key}.lora_B", self.lora_B.detach()
