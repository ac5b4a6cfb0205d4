"""What a host gives adapters: the base model's projections, and the tokens of a running forward.

Axes: T tokens of one segment, I in_features, O out_features, D hidden, F feed-forward, E experts,
K slots of a token, S columns of an A product, n rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loraloom.errors import AdapterError
from loraloom.ops.dropout import SampleNoise
from loraloom.ranks import own_part, whole
from loraloom.routing.record import LayerRouting, with_tensors


@dataclass(frozen=True)
class QuantisedWeight:
    """A linear layer's W as a library keeps it, in fewer bits."""

    linear: Any
    kind: str
    read: Callable[[Any], Tensor]  # from the layer to W in floating point, [O, I]
    is_linear_over_rows: bool = True

    def dequantised(self) -> Tensor:
        return self.read(self.linear)


class BaseProjection:
    """A frozen linear layer of the base model, with what DoRA needs to know of it."""

    def __init__(self, linear: Any, key: str, quantised: QuantisedWeight | None = None):
        self.linear: nn.Module = linear
        self.key = key
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.quantised = quantised
        self._squared_norms: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """W, [O, I]: the base's own, put together where it is sharded, or a dequantized copy."""
        if self.quantised is not None:
            return self.quantised.dequantised()
        return whole(self.linear.weight)  # pyright: ignore[reportArgumentType]

    def check_can_be_changed(self) -> None:
        """Raise an AdapterError if the base stores the weight quantized, or only a part of it."""
        if self.quantised is not None:
            raise AdapterError(
                f"merging changes the base's weights, which must be floating-point numbers, got "
                f"{self.key} in {self.quantised.kind}; load the base model without quantization, "
                "or let `loraloom export` write the merged model"
            )
        stored: Any = self.linear.weight
        if own_part(stored) is not stored:
            raise AdapterError(
                f"merging requires the whole base model in each process, got a part of {self.key}; "
                "load the base model without sharding"
            )

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Put other values into W, rounded to its dtype."""
        self.weight.copy_(weight)
        self._squared_norms = None

    @torch.no_grad()
    def product(self, lora_A: Float[Tensor, "S I"]) -> Float[Tensor, "O S"]:
        """Compute W Aᵀ in W's dtype."""
        weight = self.weight
        return weight @ lora_A.T.to(weight.dtype)

    def compute_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The layer's bias in the dtype of its output, [O]."""
        bias: Any = self.linear.bias
        return None if bias is None else bias.to(dtype)

    @property
    def name(self) -> str:
        """The projection's name in its block."""
        return self.key.rpartition(".")[2]

    @property
    def device(self) -> torch.device:
        return next(chain(self.linear.parameters(), self.linear.buffers())).device

    @property
    def is_linear_over_rows(self) -> bool:
        """Whether W(x + y) = Wx + Wy."""
        return self.quantised is None or self.quantised.is_linear_over_rows

    @property
    def squared_norms(self) -> Tensor:
        """‖W‖² of each output row, [O], in float32 or better; computed once on a device."""
        if self._squared_norms is None or self._squared_norms.device != self.device:
            # In bfloat16 a sum of thousands of squares would keep two digits.
            weight = self.weight.detach()
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            self._squared_norms = wide.square().sum(1)
        return self._squared_norms


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

    @property
    def blocks(self) -> dict[str, Mapping[str, BaseProjection]]:
        """Both blocks' projections by the block's name."""
        return {self.attention_block: self.attention, self.ffn_block: self.ffn}

    @property
    def projections(self) -> list[BaseProjection]:
        return [*self.attention.values(), *self.ffn.values()]


@dataclass(frozen=True)
class BaseInfo:
    """A base model, as adapters' files see it."""

    name_or_path: str
    model_type: str
    """Its family's name in transformers."""
    layers_path: str
    """Path of the decoder layers, `model.layers` for instance."""
    attention: str
    ffn: str
    """Names of the blocks, and of their projections:"""
    attention_projections: tuple[str, ...]
    ffn_projections: tuple[str, ...]
    activation: str
    """Of the FFN, as the model's config names it."""
    num_layers: int
    hidden_size: int
    shapes: dict[str, tuple[int, int]]
    """`block.projection` to (out_features, in_features)."""
    num_parameters: int
    fingerprint: str
    """Hash of the shapes and of some of each weight's numbers, rounded to bfloat16."""
    quantization: str | None = None
    """How its projections are kept, `bitsandbytes nf4` for instance; None: in floating point."""
    modules: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """What adapters can have as their own: modules outside of the projections that have parameters,
    by path, and the parameters' shapes."""
    embedding: str = ""
    head: str = ""
    """Paths of the input and the output embeddings."""
    ties_head: bool = False
    """Whether the two have one weight."""
    attention_layers: tuple[int, ...] | None = None
    """The decoder layers that have the attention projections; None: all."""
    has_own_names: bool = True
    """No other linear module of the model has a projection's name."""
    first_fingerprint: str = ""
    """The fingerprint in the form of earlier versions, whose adapters and checkpoints have it."""

    def has_fingerprint(self, recorded: str | None) -> bool:
        """Whether a recorded fingerprint, of either form, is this model's."""
        return recorded in (self.fingerprint, self.first_fingerprint)

    def layers_without_weights(self) -> list[BaseLayer]:
        """Describe the projections on the meta device, where an adapter's shapes are read off."""
        # One module for all layers: thousands of projections would take seconds even on meta.
        linears = {
            path: nn.Linear(width, height, bias=False, device="meta")
            for path, (height, width) in self.shapes.items()
        }

        def block(index: int, name: str) -> dict[str, BaseProjection]:
            return {
                path.partition(".")[2]: BaseProjection(linear, f"layers.{index}.{path}")
                for path, linear in linears.items()
                if path.startswith(f"{name}.")
            }

        *inputs, output = self.ffn_projections or ("",)
        shape, attended = FfnShape(tuple(inputs), output), self.attention_layers
        layers = []
        for index in range(self.num_layers):
            attends = attended is None or index in attended
            attention = block(index, self.attention) if attends else {}
            blocks = (self.attention, attention, self.ffn, block(index, self.ffn))
            layers.append(BaseLayer(index, *blocks, shape, self.hidden_size))
        return layers


@dataclass(frozen=True)
class SegmentTokens:
    """An adapter's tokens in a layer."""

    layer: int  # index of the decoder layer
    real: Tensor | None = None  # True at real tokens, [T]; None when there is no padding
    real_index: Tensor | None = None  # their positions
    noise: SampleNoise | None = None  # for dropout and jitter; None outside training
    record: Callable[[LayerRouting], None] | None = None  # of a router; None where nobody asks
    row_length: int = 1  # tokens of a row of the batch

    def samples(self, hidden_states: Float[Tensor, "T I"]) -> Int[Tensor, " T"]:
        """Number the samples that tokens are of, or their rows outside training; padding: -1."""
        numbers = torch.arange(len(hidden_states), device=hidden_states.device) // self.row_length
        for number, span in enumerate(() if self.noise is None else self.noise.spans):
            numbers[span.tokens] = number
        return numbers if self.real is None else numbers.where(self.real, -1)

    def record_routing(
        self,
        router_logits: Float[Tensor, "T E"],
        selected_experts: Int[Tensor, "T K"],
        routing_weights: Float[Tensor, "T K"],
        projection: str | None = None,
        extra: Mapping[str, Float[Tensor, "T ..."]] = MappingProxyType({}),
    ) -> None:
        """Record what a router did with the real tokens among these."""
        # It is that of a projection, as `self_attn.q_proj`; None for an FFN block's.
        if self.record is None:
            return
        values = (router_logits, selected_experts, routing_weights)
        routing, real_index = LayerRouting(self.layer, *values, projection, extra), self.real_index
        # Padding is left out here, so that no loss or count has to know of it.
        if real_index is not None:
            routing = with_tensors([routing], lambda parts: parts[0].index_select(0, real_index))
        self.record(routing)

    def beyond_capacity(
        self, selected_experts: Int[Tensor, "T K"], capacity: int | None
    ) -> Tensor | None:
        """Tell which tokens an expert that takes so many of a sample leaves out; None: none."""
        # Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, section 2.2, by sample.
        if capacity is None or self.noise is None:
            return None
        beyond = torch.zeros_like(selected_experts, dtype=torch.bool)
        for span in self.noise.spans:
            own = selected_experts[span.tokens]  # (t, 1)
            beyond[span.tokens] = (own == own.T).tril().sum(1, keepdim=True) > capacity
        return beyond


@dataclass(frozen=True)
class SampleTokens:
    """A sample among the tokens of a record: how many are real, and the group of its experts."""

    num_tokens: int
    expert_group: int = 0
    """Of the experts that are meant for its kind of data, 0 or 1."""


# What routers did in one forward, an entry for each.
Records = Sequence[LayerRouting]
# Whose tokens records hold, in their order; None where nobody knows.
Samples = Sequence[SampleTokens] | None


@dataclass(frozen=True)
class FfnRows:
    """An adapter's half-done FFN block, waiting for the base's output projection."""

    hidden: Tensor  # rows to send through it, [n, F]
    finish: Callable[[Tensor], Tensor]  # from its output for these, [n, D], to the block's, [T, D]


@dataclass(frozen=True)
class MoeFfn:
    """An FFN block as mixture-of-experts checkpoints have it: softmax, top_k, renormalized."""

    router: Tensor  # [E, D]
    top_k: int  # experts of each token
    weight: Callable[[int, str, torch.dtype], Tensor]
    """From an expert, a projection's name and a dtype to its whole weight, [O, I]."""

    @property
    def num_experts(self) -> int:
        return len(self.router)
