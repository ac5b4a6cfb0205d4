"""The base model as adapters and their files see it.

Axes: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.errors import AdapterError
from loraloom.ranks import whole


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
        self.check_is_floating_point()
        return whole(self.linear.weight)  # pyright: ignore[reportArgumentType]

    def check_is_floating_point(self) -> None:
        """Raise an AdapterError if the base stores the weight quantised."""
        weight = self.linear.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise AdapterError(
                f"weight_decomposition, starts from the base's weights, merging and exporting need "
                f"these in floating point, got a quantised {self.key}; load the base model "
                "unquantised or do without"
            )

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Put other values into W, rounded to its dtype."""
        self.weight.copy_(weight)
        self._squared_norms = None

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


@dataclass(frozen=True)
class FfnShape:
    """How a family builds its FFN block: its input projections, its output, whether it is fused."""

    inputs: tuple[str, ...]
    output: str

    @property
    def fused(self) -> bool:
        """One input projection makes gate and up side by side."""
        return self.inputs == ("gate_up_proj",)


@dataclass(frozen=True)
class BaseLayer:
    """One decoder layer's projections, as an adapter sees them."""

    index: int
    attention_block: str
    attention: Mapping[str, BaseProjection]
    ffn_block: str
    ffn: Mapping[str, BaseProjection]
    ffn_shape: FfnShape
    hidden_size: int

    @property
    def blocks(self) -> dict[str, Mapping[str, BaseProjection]]:
        """Both blocks' projections by the block's name."""
        return {self.attention_block: self.attention, self.ffn_block: self.ffn}


@dataclass(frozen=True)
class BaseInfo:
    """A base model, as adapters' files see it.

    Args:
        name_or_path: As it was loaded.
        model_type: Its family's name in transformers.
        layers_path: Path of the decoder layers, `model.layers` for instance.
        attention: Name of the attention block.
        ffn: Name of the FFN block.
        attention_projections: Names of its projections.
        ffn_projections: Names of its projections.
        activation: Name of the FFN's activation in the model's config.
        num_layers: Decoder layers.
        hidden_size: Width of the hidden states.
        shapes: `block.projection` to (out_features, in_features).
        num_parameters: Parameters of the whole base model.
        fingerprint: Hash of the shapes and of a few weights rounded to bfloat16.
    """

    name_or_path: str
    model_type: str
    layers_path: str
    attention: str
    ffn: str
    attention_projections: tuple[str, ...]
    ffn_projections: tuple[str, ...]
    activation: str
    num_layers: int
    hidden_size: int
    shapes: dict[str, tuple[int, int]]
    num_parameters: int
    fingerprint: str
