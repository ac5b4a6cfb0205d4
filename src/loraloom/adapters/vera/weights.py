"""VeRA's weights: d and b on each projection, A and B for all.

Axes: I in_features, O out_features, R rank.

`b ∘ B(d ∘ Ax)` is the LoRA with A and `diag(b) B diag(d)`, so all forms of a LoRA serve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Weights
from loraloom.adapters.base import BaseLayer, BaseProjection
from loraloom.adapters.low_rank import Projection
from loraloom.adapters.vera.config import VeraConfig


class SharedProjections(Weights):
    """Frozen A, [R, largest I], and B, [largest O, R]; a projection takes its corner.

    Source: peft 0.21.2, `peft/tuners/vera/model.py`, which draws the same numbers.
    """

    def __init__(self, config: VeraConfig, base_layers: Sequence[BaseLayer], dtype: torch.dtype):
        super().__init__()
        adapted = [
            projection
            for layer in base_layers
            for block in layer.blocks.values()
            for name, projection in block.items()
            if name in config.targets_in(layer)
        ]
        generator = torch.Generator().manual_seed(config.projection_seed)
        options = {"dtype": dtype, "device": adapted[0].device}
        in_features = max(projection.in_features for projection in adapted)
        out_features = max(projection.out_features for projection in adapted)
        for name, shape in (
            ("vera_A", (config.rank, in_features)),
            ("vera_B", (out_features, config.rank)),
        ):
            bound = math.sqrt(6 / shape[1])
            matrix = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, matrix.to(**options))
        self._saved = config.save_projection

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield A and B where they are saved."""
        if self._saved:
            yield "shared.vera_A", self.get_buffer("vera_A")
            yield "shared.vera_B", self.get_buffer("vera_B")


class VeraProjection(Projection):
    """d, [R], and b, [O], on a projection."""

    def __init__(
        self,
        base: BaseProjection,
        config: VeraConfig,
        shared: SharedProjections,
        dtype: torch.dtype,
    ):
        super().__init__(base)
        options = {"dtype": dtype, "device": base.device}
        self.lambda_b = nn.Parameter(torch.zeros(base.out_features, **options))
        self.lambda_d = nn.Parameter(torch.full((config.rank,), config.d_initial, **options))
        self._shared = (shared,)  # in a tuple, as the adapter owns it and no projection does

    @property
    def num_columns(self) -> int:
        """R."""
        return len(self.lambda_d)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """The corner of A, [R, I]."""
        return self._shared[0].get_buffer("vera_A")[:, : self.base.in_features].to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """The corner of B between d and b, [R, O]."""
        corner = self._shared[0].get_buffer("vera_B")[: self.base.out_features]
        return (self.lambda_d.unsqueeze(1) * corner.T * self.lambda_b).to(dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield b and d."""
        yield f"{self.key}.lambda_b", self.lambda_b.detach()
        yield f"{self.key}.lambda_d", self.lambda_d.detach()
