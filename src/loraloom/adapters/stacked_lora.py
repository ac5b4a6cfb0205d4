"""LoRA and DoRA on the experts of a base model, whose weights are one tensor.

Axes: E experts of the base model, M LoRA experts in each (1 for a plain LoRA), G = M·E, R rank,
I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Projection
from loraloom.adapters.low_rank import LowRankConfig, initial_A
from loraloom.base.blocks import BaseProjection
from loraloom.ops.expert_rows import ExpertSide
from loraloom.ops.low_rank import dora_norms


class StackedLoraProjection(Projection):
    """A and B of every expert, [M, E, R, I] and [M, E, O, R], and DoRA's magnitudes, [M, E, O]."""

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_choices: int | None,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(base)
        self.config = config
        self.is_mixture = num_choices is not None
        prefixes = [self.key]
        if num_choices is not None:
            prefixes = [f"{self.key}.experts.{choice}" for choice in range(num_choices)]
        self._prefixes = prefixes
        num_experts: Any = base.num_experts
        shape = (len(prefixes), num_experts, config.rank, base.in_features)
        options: Any = {"dtype": dtype, "device": base.device}
        initial = torch.empty(shape, dtype=torch.float32)
        for choice, prefix in enumerate(prefixes):
            for expert in range(num_experts):
                name = f"{prefix}.lora_A.{expert}"
                initial[choice, expert] = initial_A(shape[2:], config.init, seed, name)
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(*shape[:2], base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        self.lora_magnitude_vector = None
        if getattr(config, "weight_decomposition", False):
            norms = base.squared_norms.sqrt().to(**options)
            self.lora_magnitude_vector = nn.Parameter(norms.repeat(len(prefixes), 1, 1))

    @property
    def num_columns(self) -> int:
        return self.lora_A.shape[:3].numel()

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A by group, [G, R, I]."""
        return self.lora_A.flatten(0, 1).to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B times scaling by group, [G, R, O]."""
        scaled = self.lora_B.flatten(0, 1).transpose(1, 2) * self.config.scaling
        return scaled.to(dtype).contiguous()

    def row_scale(self) -> Tensor | None:
        """DoRA's c = m / ‖W + sBA‖, [G, O]; the norm has no gradient."""
        if self.lora_magnitude_vector is None:
            return None
        with torch.no_grad():
            norms = self._norms()
        smallest = torch.finfo(norms.dtype).tiny
        return (self.lora_magnitude_vector / norms.clamp_min(smallest)).flatten(0, 1)

    def _norms(self) -> Tensor:
        """‖W + sBA‖ of each output row, [M, E, O]."""
        norms = torch.empty(self.lora_B.shape[:3], dtype=self.lora_A.dtype, device=self.base.device)
        for choice, lora_A in enumerate(self.lora_A):
            products = self.base.product(lora_A)  # (E, O, R)
            for expert, product in enumerate(products):
                norms[choice, expert] = dora_norms(
                    product,
                    self.base.squared_norms[expert],
                    lora_A[expert : expert + 1],
                    self.lora_B[choice, expert].unsqueeze(0),
                    self.config.scaling,
                )[0]
        return norms

    def side(self, dtype: torch.dtype) -> ExpertSide:
        return ExpertSide(self.compute_A(dtype), self.compute_B(dtype), self.row_scale())

    @torch.no_grad()
    def merged(self, dtype: torch.dtype, expert: int = 0, num_experts: int = 1) -> Tensor:
        """Compute c ∘ (W + BA) of all of the base's experts, [E, O, I]."""
        groups = slice(expert * self.lora_A.shape[1], (expert + 1) * self.lora_A.shape[1])
        lora_A = self.compute_A(dtype)[groups]
        update = self.compute_B(dtype)[groups].transpose(1, 2) @ lora_A
        merged = update.add_(self.base.weight.to(dtype))
        row_scale = self.row_scale()
        return merged if row_scale is None else merged.mul_(row_scale[groups].to(dtype)[..., None])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            parts["magnitude"] = self.lora_magnitude_vector
        for choice, prefix in enumerate(self._prefixes):
            for name, parameter in parts.items():
                yield f"{prefix}.{name}", parameter.detach()[choice]
