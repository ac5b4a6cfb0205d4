"""A LoRA's or DoRA's weights on one projection; in a mixture, those of all its experts.

Axes: I in_features, O out_features, E experts (1 for a plain LoRA), R rank, S = E·R.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loraloom.adapters.base import BaseProjection
from loraloom.adapters.config import LowRankConfig
from loraloom.adapters.lora.config import DecomposedConfig
from loraloom.adapters.low_rank import Projection, initial_A
from loraloom.ops.low_rank import dora_norms


class _ScaledTranspose(torch.autograd.Function):
    """B [E, O, R] times scaling as [S, O] in the products' dtype, in one pass over the weights.

    A plain LoRA's B is small enough for the four calls that this replaces to be faster.
    """

    @staticmethod
    def forward(ctx, lora_B, scaling, dtype):
        ctx.scaling, ctx.dtype, ctx.rank = scaling, lora_B.dtype, lora_B.shape[-1]
        num_experts, out_features, rank = lora_B.shape
        scaled = lora_B.new_empty(num_experts, rank, out_features, dtype=dtype)
        torch.mul(lora_B.transpose(1, 2), scaling, out=scaled)
        return scaled.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        experts = grad.unflatten(0, (-1, ctx.rank))  # (E, R, O)
        grad_B = grad.new_empty(experts.transpose(1, 2).shape, dtype=ctx.dtype)
        torch.mul(experts.transpose(1, 2), ctx.scaling, out=grad_B)
        return grad_B, None, None


class LoraProjection(Projection):
    """A, B and, with weight decomposition, the magnitudes of a projection's experts."""

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_experts: int | None,
        dtype: torch.dtype,
        seed: int,
        shared: LoraProjection | None = None,
    ):
        super().__init__(base)
        self.config = config
        self.is_mixture = num_experts is not None
        self.shared = shared
        names = [f"{self.key}.lora_A"]
        if num_experts is not None:
            names = [f"{self.key}.experts.{expert}.lora_A" for expert in range(num_experts)]
        shape = (config.rank, base.in_features)
        init = "gaussian" if config.init == "gaussian" else "kaiming"
        initial = torch.stack([initial_A(shape, init, seed, name) for name in names])
        options = {"dtype": dtype, "device": base.device}
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(len(names), base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        self.lora_magnitude_vector = None
        if isinstance(config, DecomposedConfig) and config.weight_decomposition:
            norms = base.squared_norms.sqrt().to(**options).repeat(len(names), 1)
            self.lora_magnitude_vector = nn.Parameter(norms)
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def start_from(self, start_A: Tensor, start_B: Tensor, *, off: bool) -> None:
        """Begin with other weights."""
        with torch.no_grad():
            self.lora_A.copy_(start_A)
            self.lora_B.copy_(start_B)
        if off:
            self.start_A = self.lora_A.detach().clone()
            self.start_B = -self.lora_B.detach()

    @property
    def num_columns(self) -> int:
        """S."""
        return self._all_A().shape[:2].numel()

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A of all experts, [S, I]."""
        return self._all_A().flatten(0, 1).to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B of all experts times scaling, [S, O]."""
        if not self.is_mixture:
            return (self._all_B() * self.config.scaling).transpose(1, 2).flatten(0, 1).to(dtype)
        return _ScaledTranspose.apply(self._all_B(), self.config.scaling, dtype)  # pyright: ignore

    def row_scale(self) -> Tensor | None:
        """DoRA's c = m / ‖W + sBA‖ of each expert's rows, [E, O]; the norm has no gradient."""
        if self.lora_magnitude_vector is None:
            return None
        with torch.no_grad():
            lora_A = self._all_A()
            norms = dora_norms(
                self.base.product(lora_A.flatten(0, 1)),
                self.base.squared_norms,
                lora_A,
                self._all_B(),
                self.config.scaling,
            )
        tiny = torch.finfo(norms.dtype).tiny  # a zero row of W: 0 / tiny instead of 0 / 0
        return self.lora_magnitude_vector / norms.clamp_min(tiny)

    def _all_A(self) -> Tensor:
        """A, [E, R, I]; behind it A₀, or in each expert what all share, where there is such."""
        if self.shared is not None:
            behind = self.shared.lora_A.expand(len(self.lora_A), -1, -1)
        elif self.start_A is not None:
            behind = self.start_A
        else:
            return self.lora_A
        return torch.cat([self.lora_A, behind], 1)

    def _all_B(self) -> Tensor:
        """B, [E, O, R]; behind it -B₀, or what all share in the experts' own scaling."""
        if self.shared is not None:
            rescaled = self.shared.lora_B * (self.shared.config.scaling / self.config.scaling)
            behind = rescaled.expand(len(self.lora_B), -1, -1)
        elif self.start_B is not None:
            behind = self.start_B
        else:
            return self.lora_B
        return torch.cat([self.lora_B, behind], 2)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor under its name, experts apart."""
        named = {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "magnitude": self.lora_magnitude_vector,
        }
        for expert in range(len(self.lora_A)):
            prefix = f"{self.key}.experts.{expert}" if self.is_mixture else self.key
            for name, parameter in named.items():
                if parameter is not None:
                    yield f"{prefix}.{name}", parameter.detach()[expert]
