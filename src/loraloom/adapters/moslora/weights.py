"""MoSLoRA's weights: A, M and B on each projection.

Axes: I in_features, O out_features, R rank.

`B(M(Ax))` is the LoRA with A and `B M`, so all forms of a LoRA serve.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loraloom.adapters.base import BaseProjection
from loraloom.adapters.low_rank import Projection, generator_for, initial_A, kaiming_uniform
from loraloom.adapters.moslora.config import MosLoraConfig


class MosLoraProjection(Projection):
    """A, [R, I], M, [R, R], and B, [O, R], on a projection; B starts at zero."""

    def __init__(self, base: BaseProjection, config: MosLoraConfig, dtype: torch.dtype, seed: int):
        super().__init__(base)
        rank, options = config.rank, {"dtype": dtype, "device": base.device}
        lora_A = initial_A((rank, base.in_features), config.init, seed, f"{self.key}.lora_A")
        mixer = initial_mixer(rank, config, seed, f"{self.key}.mixer")
        self.lora_A = nn.Parameter(lora_A.to(**options))
        self.mixer = nn.Parameter(mixer.to(**options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        self.scaling = config.scaling

    @property
    def num_columns(self) -> int:
        """R."""
        return len(self.lora_A)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A, [R, I]."""
        return self.lora_A.to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B M times scaling, transposed, [R, O]."""
        return (self.scaling * (self.lora_B @ self.mixer).T).to(dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield A, M and B."""
        yield f"{self.key}.lora_A", self.lora_A.detach()
        yield f"{self.key}.mixer", self.mixer.detach()
        yield f"{self.key}.lora_B", self.lora_B.detach()


def initial_mixer(rank: int, config: MosLoraConfig, seed: int, name: str) -> Tensor:
    """Draw an M, [R, R], by the configuration's `mixer_init`."""
    if config.mixer_init == "orthogonal":
        return nn.init.orthogonal_(torch.empty(rank, rank), generator=generator_for(seed, name))
    return kaiming_uniform((rank, rank), seed, name)
