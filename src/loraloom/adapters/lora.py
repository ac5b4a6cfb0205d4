"""LoRA, rsLoRA and DoRA: a low-rank update on each adapted projection, or one for each expert.

Axes: I in_features, O out_features, E experts (1 for a plain LoRA), R rank, S = E·R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loraloom.adapters.contract import MAX_NUMBER, MAX_RANK, AdapterConfig, Adjustable, Projection
from loraloom.adapters.low_rank import LowRankConfig, initial_A
from loraloom.adapters.stacked_lora import StackedLoraProjection
from loraloom.adapters.tensor_names import Pattern, TensorKey, matches
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.errors import AdapterError
from loraloom.ops.low_rank import dora_norms

_Index = Annotated[int, Field(ge=0)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
_Value = TypeVar("_Value")


class DecomposedConfig(LowRankConfig):
    """A LoRA on each projection, or a DoRA: what plain adapters and experts have in common."""

    weight_decomposition: bool = False
    """Train the norm of each output row separately: DoRA, or MixDoRA in a mixture."""

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "DoRA" if self.weight_decomposition else "LoRA"

    @property
    def needs_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weight_decomposition


class LoraConfig(DecomposedConfig):
    """Low-rank adaptation: y = Wx + b + s·B(A(dropout(x))).

    A name in `target_modules` may be the end of `layers.{layer}.{block}.{projection}`, which then
    adapts that projection alone.

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353;
    Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
    """

    peft_type = "LORA"
    layout = "peft"
    targets_places = True
    adapts_stacks = True
    formula = "y = Wx + b + s·B(Ax)"
    aliases: ClassVar = {
        "dora": "method: lora with weight_decomposition: true",
        "rslora": "method: lora with rank_stabilized: true",
        "lora+": "method: lora and train.loraplus_lr_ratio",
        "loraplus": "method: lora and train.loraplus_lr_ratio",
    }

    method: Literal["lora"] = "lora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Low-rank adaptation of linear layers."""
    layers: Adjustable[tuple[_Index, ...] | None] = Field(default=None, min_length=1)
    """Decoder layers to adapt, counted from 0; null: all."""
    rank_pattern: dict[Pattern, _Rank] = Field(default_factory=dict)
    """Other ranks, by regular expressions of which the first counts that matches the end of
    `layers.{layer}.{block}.{projection}`, as in PEFT."""
    alpha_pattern: dict[Pattern, _Alpha] = Field(default_factory=dict)
    """Other alphas, by the same kind of expressions."""

    def at(self, key: str) -> LoraConfig:
        """Return the settings of one projection, `layers.{layer}.{block}.{projection}`."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        values = {
            "rank": pattern_value(self.rank_pattern, key, self.rank),
            "alpha": pattern_value(self.alpha_pattern, key, self.alpha),
        }
        return self.model_copy(update=values | {"rank_pattern": {}, "alpha_pattern": {}})

    def scaling_of(self, key: TensorKey) -> float:
        return self.at(f"layers.{key.layer}.{key.path}").scaling

    def combined(self) -> AdapterConfig:
        if self.rank_pattern:
            raise AdapterError("adapters with a rank_pattern cannot be combined; use (name, scale)")
        return super(LoraConfig, self.model_copy(update={"alpha_pattern": {}})).combined()

    def targets_in(self, block: Block) -> frozenset[str]:
        if self.layers is not None and block.layer not in self.layers:
            return frozenset()
        return super().targets_in(block)

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        for layer in self.layers or ():
            if layer >= len(base_layers):
                raise AdapterError(f"layers must be in [0, {len(base_layers)}), got {layer}")
        super().check_fits(base_layers)
        keys = [base.key for base in self.adapted(base_layers)]
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(matches(pattern, key) for key in keys):
                raise AdapterError(
                    "rank_pattern and alpha_pattern must match adapted projections, such as "
                    f"{keys[0]}, got {pattern}"
                )

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        config = self.at(base.key)
        if base.num_experts is None:
            return LoraProjection(base, config, None, dtype, seed)
        return StackedLoraProjection(base, config, None, dtype, seed)


def pattern_value(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """Return the value of the first pattern that matches a module's name."""
    for pattern, value in patterns.items():
        if matches(pattern, name):
            return value
    return default


class _ScaledTranspose(torch.autograd.Function):
    """B [E, O, R] times scaling as [S, O] in the products' dtype, in one pass over the weights."""

    # A plain LoRA's B is small enough for the four calls that this replaces to be faster.

    @staticmethod
    def forward(ctx, lora_B, scaling, dtype):
        ctx.scaling = scaling
        ctx.dtype = lora_B.dtype
        ctx.rank = lora_B.shape[-1]
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
        # Filled one by one: on the meta device torch.stack would import sympy.
        initial = torch.empty(len(names), *shape, dtype=torch.float32)
        for expert, name in enumerate(names):
            initial[expert] = initial_A(shape, config.init, seed, name)
        options = {"dtype": dtype, "device": base.device}
        self.lora_A = nn.Parameter(initial.to(**options))
        zeros = torch.zeros(len(names), base.out_features, config.rank, **options)
        self.lora_B = nn.Parameter(zeros)
        self.lora_magnitude_vector = None
        if isinstance(config, DecomposedConfig) and config.weight_decomposition:
            norms = base.squared_norms.sqrt().to(**options).repeat(len(names), 1)
            self.lora_magnitude_vector = nn.Parameter(norms)

    @property
    def num_columns(self) -> int:
        return self._all_A().shape[:2].numel()

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A of all experts, [S, I]."""
        return self._all_A().flatten(0, 1).to(dtype)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B of all experts times scaling, [S, O]."""
        if not self.is_mixture:
            scaled = (self._all_B() * self.config.scaling).transpose(1, 2).flatten(0, 1)
            # products with rows that lie apart take a CPU up to twice as long
            return scaled.to(dtype).contiguous()
        return _ScaledTranspose.apply(self._all_B(), self.config.scaling, dtype)  # pyright: ignore

    def row_scale(self) -> Tensor | None:
        """DoRA's c = m / ‖W + sBA‖ of each expert's rows, [E, O]; the norm has no gradient."""
        if self.lora_magnitude_vector is None:
            return None
        # The paper takes the norm as a constant; its gradient would need W + sBA in full.
        with torch.no_grad():
            lora_A = self._all_A()
            product = self.base.product(lora_A.flatten(0, 1))
            squares = self.base.squared_norms
            norms = dora_norms(product, squares, lora_A, self._all_B(), self.config.scaling)
        # A zero row of W has the norm and the magnitude 0: 0 / tiny in place of 0 / 0.
        return self.lora_magnitude_vector / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _all_A(self) -> Tensor:
        """A, [E, R, I]; behind each expert's what all share, where there is such."""
        if self.shared is None:
            return self.lora_A
        shared = self.shared.lora_A.expand(len(self.lora_A), -1, -1)
        return torch.cat([self.lora_A, shared], 1)

    def _all_B(self) -> Tensor:
        """B, [E, O, R]; behind each expert's what all share, in the experts' scaling."""
        if self.shared is None:
            return self.lora_B
        rescaled = self.shared.lora_B * (self.shared.config.scaling / self.config.scaling)
        shared = rescaled.expand(len(self.lora_B), -1, -1)
        return torch.cat([self.lora_B, shared], 2)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor under its name, experts apart."""
        parts = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.lora_magnitude_vector is not None:
            parts["magnitude"] = self.lora_magnitude_vector
        for expert in range(len(self.lora_A)):
            prefix = f"{self.key}.experts.{expert}" if self.is_mixture else self.key
            for name, parameter in parts.items():
                yield f"{prefix}.{name}", parameter.detach()[expert]
