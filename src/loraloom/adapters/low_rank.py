"""The trained weights of one projection: one LoRA, or the experts of a mixture.

Axes: I in_features, O out_features, E experts (1 for a plain LoRA), R rank, S = E·R.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loraloom.config.adapter import LoraConfig
from loraloom.errors import AdapterError
from loraloom.ops.low_rank import dora_norms


class BaseProjection:
    """A frozen linear layer of the base model, with what DoRA needs to know of it."""

    def __init__(self, linear: nn.Module, key: str, in_features: int, out_features: int):
        self.linear = linear
        self.key = key
        self.in_features = in_features
        self.out_features = out_features
        self._squared_norms: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W, [O, I].

        Raises:
            AdapterError: If the base stores it quantised.
        """
        weight = self.linear.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise AdapterError(
                f"weight_decomposition needs floating-point base weights, got a quantised "
                f"{self.key}; load the base model unquantised or use a method without it"
            )
        return weight

    def compute_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The layer's bias in the dtype of its output, [O]."""
        bias: Any = self.linear.bias
        return None if bias is None else bias.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return next(self.linear.parameters()).device

    @cached_property
    def is_linear_over_rows(self) -> bool:
        """Whether W(x + y) = Wx + Wy. LLM.int8 rounds each row of its input by its maximum."""
        return type(self.linear).__name__ != "Linear8bitLt"

    @property
    def squared_norms(self) -> Tensor:
        """‖W‖² of each output row, [O], in float32 or better; computed once on a device."""
        weight = self.weight.detach()
        if self._squared_norms is None or self._squared_norms.device != weight.device:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            self._squared_norms = wide.square().sum(1)
        return self._squared_norms


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


class LowRank(nn.Module):
    """A, B and, with weight decomposition, the magnitudes of a projection's experts.

    Args:
        base: The projection that is adapted.
        config: Rank, scaling, initialisation, weight decomposition.
        num_experts: E, or None for a plain LoRA (which is stored as E = 1).
        dtype: Of the trained weights, at least float32.
        key: The projection's name in files, from which each tensor draws its initial values.
        seed: Of the job.
    """

    def __init__(
        self,
        base: BaseProjection,
        config: LoraConfig,
        num_experts: int | None,
        dtype: torch.dtype,
        key: str,
        seed: int,
    ):
        super().__init__()
        self.base = base
        self.config = config
        self.key = key
        self.is_mixture = num_experts is not None
        names = [f"{key}.lora_A"]
        if num_experts is not None:
            names = [f"{key}.experts.{expert}.lora_A" for expert in range(num_experts)]
        shape = (config.rank, base.in_features)
        initial = torch.stack([_initial_A(shape, config.init, seed, name) for name in names])
        options = {"dtype": dtype, "device": base.device}
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(len(names), base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        self.lora_magnitude_vector = None
        if config.weight_decomposition:
            norms = base.squared_norms.sqrt().to(**options).repeat(len(names), 1)
            self.lora_magnitude_vector = nn.Parameter(norms)
        self.weights = tuple(self.parameters())

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.lora_A)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A in compute form, [S, I]."""
        return self.lora_A.flatten(0, 1).to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B times scaling in compute form, [S, O]."""
        if not self.is_mixture:
            return (self.lora_B * self.config.scaling).transpose(1, 2).flatten(0, 1).to(dtype)
        return _ScaledTranspose.apply(self.lora_B, self.config.scaling, dtype)  # pyright: ignore

    def row_scale(self) -> Tensor | None:
        """DoRA's c = m / ‖W + sBA‖ of each expert's rows, [E, O]; the norm has no gradient."""
        if self.lora_magnitude_vector is None:
            return None
        with torch.no_grad():
            norms = dora_norms(
                self.base.weight,
                self.base.squared_norms,
                self.lora_A,
                self.lora_B,
                self.config.scaling,
            )
        tiny = torch.finfo(norms.dtype).tiny  # a zero row of W: 0 / tiny instead of 0 / 0
        return self.lora_magnitude_vector / norms.clamp_min(tiny)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor under its name, experts apart, as views of the parameters."""
        named = {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "magnitude": self.lora_magnitude_vector,
        }
        for expert in range(self.num_experts):
            prefix = f"{self.key}.experts.{expert}" if self.is_mixture else self.key
            for name, parameter in named.items():
                if parameter is not None:
                    yield f"{prefix}.{name}", parameter.detach()[expert]


def low_rank_block(
    projections: Mapping[str, BaseProjection],
    targets: frozenset[str],
    config: LoraConfig,
    num_experts: int | None,
    dtype: torch.dtype,
    seed: int,
) -> nn.ModuleDict:
    """Make the weights of a block's targeted projections, by name."""
    return nn.ModuleDict(
        {
            name: LowRank(projection, config, num_experts, dtype, projection.key, seed)
            for name, projection in projections.items()
            if name in targets
        }
    )


def _initial_A(shape: tuple[int, int], init: str, seed: int, name: str) -> Tensor:
    """Draw A on the CPU in float32 from a generator seeded by the job's seed and the name."""
    generator = generator_for(seed, name)
    rank, in_features = shape
    if init == "gaussian":
        return torch.empty(shape).normal_(std=1 / rank, generator=generator)
    bound = 1 / math.sqrt(in_features)  # Kaiming uniform with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Make a CPU generator that depends on the seed and the name alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
