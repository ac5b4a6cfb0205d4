"""The base model as adapters and their files see it.

Axes: I in_features, O out_features, S columns of an A product, n rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraloom.errors import AdapterError
from loraloom.ranks import own_part, whole

_BLOCK_NUMBERS = 1 << 22
"""About how many numbers of a quantised weight are dequantised at a time."""


class QuantisedWeight(ABC):
    """A linear layer's W as a library keeps it, in fewer bits."""

    def __init__(
        self,
        linear: nn.Module,
        kind: str,
        row_step: int = 1,
        *,
        is_linear_over_rows: bool = True,
    ):
        self.linear: Any = linear
        self.kind = kind
        self.row_step = row_step
        self.is_linear_over_rows = is_linear_over_rows

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Dequantise rows from one to another, [n, I]."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield everything that is kept, by name."""

    def blocks(self) -> Iterator[Tensor]:
        """Dequantise W some millions of numbers at a time, [n, I] each."""
        num_rows, width = self.linear.out_features, self.linear.in_features
        size = max(_BLOCK_NUMBERS // width // self.row_step, 1) * self.row_step
        for start in range(0, num_rows, size):
            yield self.rows(start, min(start + size, num_rows))

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantise W, [O, I], in a dtype or in that of `rows`."""
        blocks, stop = self.blocks(), 0
        first = next(blocks)
        shape = (self.linear.out_features, self.linear.in_features)
        numbers = first.new_empty(shape, dtype=dtype)
        for block in chain([first], blocks):
            start, stop = stop, stop + len(block)
            numbers[start:stop] = block
        return numbers


class BaseProjection:
    """A frozen linear layer of the base model, with what DoRA needs to know of it."""

    def __init__(
        self,
        linear: nn.Module,
        key: str,
        in_features: int,
        out_features: int,
        quantised: QuantisedWeight | None = None,
    ):
        self.linear = linear
        self.key = key
        self.in_features = in_features
        self.out_features = out_features
        self.quantised = quantised
        self._squared_norms: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W, [O, I]: the base's own, put together where it is sharded, or a dequantised copy."""
        if self.quantised is not None:
            return self.quantised.whole()
        return whole(self.linear.weight)  # pyright: ignore[reportArgumentType]

    def check_can_be_changed(self) -> None:
        """Raise an AdapterError if the base stores the weight quantised, or only a part of it."""
        if self.quantised is not None:
            raise AdapterError(
                f"merging changes the base's weights, which must be floating-point numbers, got "
                f"{self.key} in {self.quantised.kind}; load the base model without quantization, "
                "or let `loraloom export` write the merged model"
            )
        stored: Any = self.linear.weight
        if own_part(stored) is not stored:
            raise AdapterError(
                f"merging changes the base's weights, of which each process must have all, got a "
                f"part of {self.key}; load the base model without sharding"
            )

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Put other values into W, rounded to its dtype."""
        self.weight.copy_(weight)
        self._squared_norms = None

    @torch.no_grad()
    def product(self, lora_A: Float[Tensor, "S I"]) -> Float[Tensor, "O S"]:
        """Compute W Aᵀ in W's dtype; of a quantised W, some rows are dequantised at a time."""
        blocks = [rows @ lora_A.T.to(rows.dtype) for rows in self._row_blocks()]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def compute_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The layer's bias in the dtype of its output, [O]."""
        bias: Any = self.linear.bias
        return None if bias is None else bias.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return next(chain(self.linear.parameters(), self.linear.buffers())).device

    @property
    def is_linear_over_rows(self) -> bool:
        """Whether W(x + y) = Wx + Wy."""
        return self.quantised is None or self.quantised.is_linear_over_rows

    @property
    def squared_norms(self) -> Tensor:
        """‖W‖² of each output row, [O], in float32 or better; computed once on a device."""
        if self._squared_norms is None or self._squared_norms.device != self.device:
            self._squared_norms = torch.cat([*map(_squared_norms, self._row_blocks())])
        return self._squared_norms

    def first_weights(self, count: int) -> Tensor:
        """Return the first numbers of W's first row."""
        row = self.weight if self.quantised is None else self.quantised.rows(0, 1)
        return row.detach().flatten()[:count]

    def _row_blocks(self) -> Iterable[Tensor]:
        """W in one, or dequantised piece by piece."""
        return [self.weight.detach()] if self.quantised is None else self.quantised.blocks()


def _squared_norms(rows: Tensor) -> Tensor:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.square().sum(1)


@dataclass(frozen=True)
class FfnShape:
    """How a family builds its FFN block: its input projections, its output, whether it is fused."""

    inputs: tuple[str, ...]
    output: str

    @property
    def names(self) -> tuple[str, ...]:
        """All projections, the output last; none where the block is no dense one."""
        return (*self.inputs, self.output) if self.inputs else ()

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
    absent: frozenset[str] = frozenset()
    """Names of projections that other layers have, and this one hasn't."""

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
        quantization: How its projections are kept, `bitsandbytes nf4` for instance; None: in
            floating point.
        modules: What adapters can have as their own: modules outside of the projections that have
            parameters, by path, and the parameters' shapes.
        embedding: Path of the input embeddings.
        head: Path of the output embeddings.
        ties_head: Whether the two have one weight.
        attention_layers: The decoder layers that have the attention projections; None: all.
        has_own_names: No other linear module of the model has a projection's name.
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
    quantization: str | None = None
    modules: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    embedding: str = ""
    head: str = ""
    ties_head: bool = False
    attention_layers: tuple[int, ...] | None = None
    has_own_names: bool = True

    def layers_without_weights(self) -> list[BaseLayer]:
        """Describe the projections on the meta device, where an adapter's shapes are read off."""
        linears = {
            path: nn.Linear(size[1], size[0], bias=False, device="meta")
            for path, size in self.shapes.items()
        }

        def block(layer: int, block: str) -> dict[str, BaseProjection]:
            return {
                path.partition(".")[2]: BaseProjection(linear, f"layers.{layer}.{path}", *size)
                for path, linear in linears.items()
                if path.startswith(f"{block}.") and self.has(layer, path)
                for size in [(linear.in_features, linear.out_features)]
            }

        *inputs, output = self.ffn_projections or ("",)
        layers = []
        for index in range(self.num_layers):
            attention = block(index, self.attention)
            absent = frozenset() if attention else frozenset(self.attention_projections)
            ffn, shape = block(index, self.ffn), FfnShape(tuple(inputs), output)
            blocks = (self.attention, attention, self.ffn, ffn)
            layers.append(BaseLayer(index, *blocks, shape, self.hidden_size, absent))
        return layers

    def has(self, layer: int, path: str) -> bool:
        """Whether a decoder layer has the projection `block.projection`."""
        if self.attention_layers is None or not path.startswith(f"{self.attention}."):
            return True
        return layer in self.attention_layers
