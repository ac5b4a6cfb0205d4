"""A and B on a projection of the base model: of one LoRA, or of the LoRA experts of a mixture.

Axes: I in_features, O out_features, M LoRA experts (1 for a plain LoRA), R rank, S = M·R; on the
experts of a base model, whose weights are one tensor, E of these, G = M·E.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.low_rank import DecomposedConfig, LowRankConfig, initial_A
from loraloom.adapters.projection import Projection
from loraloom.base.blocks import BaseProjection
from loraloom.ops.low_rank import dora_norms


class LoraProjection(Projection):
    """A, [M, R, I], B, [M, O, R], and, with weight decomposition, the magnitudes, [M, O]."""

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_experts: int | None,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(base)
        self.config = config
        self._prefixes = [self.key]
        if num_experts is not None:
            self._prefixes = [f"{self.key}.experts.{expert}" for expert in range(num_experts)]
        options: dict[str, Any] = {"dtype": dtype, "device": base.device}
        experts = [len(self._prefixes)]
        if base.num_experts is not None:
            experts.append(base.num_experts)
        # Filled one by one: on the meta device torch.stack would import sympy.
        initial = torch.empty(*experts, config.rank, base.in_features, dtype=torch.float32)
        for lora_A, prefix in zip(initial, self._prefixes, strict=True):
            self._fill(lora_A, f"{prefix}.lora_A", seed)
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(*experts, base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        self.lora_magnitude_vector = None
        if isinstance(config, DecomposedConfig) and config.weight_decomposition:
            norms = base.squared_norms.sqrt().to(**options)
            norms = norms.expand(len(self._prefixes), *norms.shape)
            self.lora_magnitude_vector = nn.Parameter(norms.contiguous())

    def _fill(self, lora_A: Tensor, name: str, seed: int) -> None:
        rank, in_features = lora_A.shape
        lora_A.copy_(initial_A((rank, in_features), self.config.init, seed, name))

    @property
    def num_columns(self) -> int:
        return self.lora_A.shape[:-1].numel()  # ty: ignore[missing-attribute]

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A of all experts, [S, I]; of stacks, [G, R, I]."""
        return self.lora_A.flatten(0, 1).to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B of all experts times scaling, [S, O]."""
        scaled = self._all_B() * self.config.scaling
        # products with rows that lie apart take a CPU up to twice as long
        stacked = scaled.transpose(1, 2).flatten(0, 1)  # (S, O)
        return stacked.to(dtype).contiguous()

    def row_scale(self) -> Tensor | None:
        """DoRA's c = m / ‖W + sBA‖ of each expert's rows, [M, O]; of stacks, [G, O]."""
        if self.lora_magnitude_vector is None:
            return None
        # The paper takes the norm as a constant; its gradient would need W + sBA in full.
        with torch.no_grad():
            norms = self._norms()
        # A zero row of W has the norm and the magnitude 0: 0 / tiny in place of 0 / 0.
        smallest = torch.finfo(norms.dtype).tiny
        magnitudes = self.lora_magnitude_vector.flatten(0, -2)
        return magnitudes / norms.clamp_min(smallest)

    def _norms(self) -> Tensor:
        """‖W + sBA‖ of each output row, [M, O]; of stacks, [G, O]."""
        product = self.base.product(self.lora_A.flatten(0, 1))  # (O, S)
        cross = product.unflatten(1, self.lora_A.shape[:2]).transpose(0, 1)
        squares = self.base.squared_norms
        return dora_norms(cross, squares, self.lora_A, self._all_B(), self.config.scaling)

    def _all_B(self) -> Tensor:
        """B of the update; a subclass may have more than B in it."""
        return self.lora_B

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        parts = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            parts["magnitude"] = self.lora_magnitude_vector
        for expert, prefix in enumerate(self._prefixes):
            for name, parameter in parts.items():
                yield f"{prefix}.{name}", parameter.detach()[expert]


class StackedLoraProjection(LoraProjection):
    """The same for every expert of a base model: [M, E, R, I], [M, E, O, R] and [M, E, O].

    A or B may be shared, [M, 1, …], and some of the experts may have no LoRA, [M, H, …].
    """

    kept: Tensor | None  # the experts that have a LoRA, [H]
    places: Tensor | None  # of each expert's factors among those, [E]; -1: none

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_choices: int | None,
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__(base, config, num_choices, dtype, seed)
        self.register_buffer("kept", None, persistent=False)
        self.register_buffer("places", None, persistent=False)

    def keep(self, experts: Sequence[int]) -> None:
        """Leave the factors of some of the base's experts."""
        device = self.lora_A.device
        kept = torch.tensor(experts, device=device)
        places = torch.full((self.lora_A.shape[1],), -1, device=device)
        places[kept] = torch.arange(len(experts), device=device)
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach()[:, kept]))
        self.kept = kept
        self.places = places

    def share(self, name: str) -> None:
        """Leave a `lora_A` or `lora_B` for all of the base's experts in place of each one's."""
        of_first = getattr(self, name).detach()[:, :1].clone()
        setattr(self, name, nn.Parameter(of_first))

    def _fill(self, lora_A: Tensor, name: str, seed: int) -> None:
        for number, matrix in enumerate(lora_A):
            super()._fill(matrix, f"{name}.{number}", seed)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B times scaling by group, [G, R, O], as it lies."""
        scaled = self.lora_B.flatten(0, 1) * self.config.scaling
        return scaled.to(dtype).transpose(1, 2)

    def _norms(self) -> Tensor:
        squares = self.base.squared_norms  # (E, O)
        if self.kept is not None:
            squares = squares[self.kept]
        shape = (-1, len(squares), -1, -1)
        lora_A = self.lora_A.expand(shape)
        lora_B = self.lora_B.expand(shape)
        product = self.base.product(lora_A.transpose(0, 1).flatten(1, 2), self.kept)  # (E, O, M·R)
        cross = product.unflatten(2, (len(lora_A), -1)).permute(2, 0, 1, 3)
        return dora_norms(cross, squares, lora_A, lora_B, self.config.scaling).flatten(0, 1)

    def of_each_expert(self, values: Tensor, blank: float = 0.0) -> Tensor:
        """Give each of the base's experts what it has in [H, …], or what all share in [1, …]."""
        num_experts = self.base.num_experts or 1
        if self.kept is None:
            return values.expand(num_experts, *values.shape[1:])
        of_all = values.new_full((num_experts, *values.shape[1:]), blank)
        return of_all.index_copy(0, self.kept, values.expand(len(self.kept), *values.shape[1:]))

    @torch.no_grad()
    def merged(self, dtype: torch.dtype, expert: int = 0, num_experts: int = 1) -> Tensor:
        weight = self.base.weight.to(dtype, copy=True)
        if self.kept is None:
            return self._merge_into(weight, expert, num_experts)
        weight[self.kept] = self._merge_into(weight[self.kept], expert, num_experts)
        return weight
