"""MixLoRA and MixDoRA: a router and LoRA experts in each FFN block, LoRA on attention.

Axes: T tokens, D hidden, E experts, K top_k.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, eq. 4-8.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from loraloom.adapters.contract import MAX_NUMBER, MAX_RANK, Adapter, Adjustable
from loraloom.adapters.experts import (
    Choice,
    ExpertCount,
    RoutedProjection,
    Router,
    RoutingConfig,
    check_has_experts,
)
from loraloom.adapters.lora import LoraConfig
from loraloom.adapters.lora_projection import LoraProjection, StackedLoraProjection
from loraloom.adapters.low_rank import DecomposedConfig, ffn_weights, projection_layers
from loraloom.adapters.projection import Projection
from loraloom.adapters.segment import MoeFfn, SegmentTokens
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.config.fields import StrictModel
from loraloom.errors import AdapterError
from loraloom.ops.dropout import Site
from loraloom.ops.expert_ffn import FfnRows, FfnWeights, Routing
from loraloom.ops.expert_weights import ExpertWeights
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from loraloom.ops.stacked import StackedFfn, stack_ffn_weights
from loraloom.routing.routes import Route, TopP, router_logits


class ExpertsConfig(StrictModel):
    """Settings of the experts that differ from the attention LoRA's; null: the same."""

    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Rank of each expert."""
    alpha: float | None = Field(default=None, gt=0, le=MAX_NUMBER)
    """Numerator of the experts' scaling."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the experts' inputs, in training only."""
    rank_stabilized: bool | None = None
    """Scale the experts by alpha / sqrt(rank)."""
    weight_decomposition: bool | None = None
    """Decompose the experts' weights, as DoRA does."""


class MixLoraConfig(RoutingConfig, DecomposedConfig):
    """A router and several LoRA experts in each FFN block, plain LoRA on attention.

    Source: Li et al. 2024, MixLoRA, arXiv:2404.15159.
    """

    peft_type = "MIXLORA"
    layout = "reference"
    adapts_stacks = True
    formula = "FFN(x) = Σ_j g_j · W_d'_e(j)(act(W_g'_e(j) x) ∘ W_u'_e(j) x), W' = W + sBA"
    aliases: ClassVar = {"mixdora": "method: mixlora with weight_decomposition: true"}

    method: Literal["mixlora"] = "mixlora"
    """Mixture of LoRA experts in the FFN blocks."""
    num_experts: ExpertCount = 8
    """Experts in each FFN block."""
    compat: Literal["moe-peft"] | None = None
    """Compute what MoE-PEFT 2.0.2 does where it differs from the method: with routing: top_p the
    temperature divides probabilities; with switch a block outside of training returns its input."""
    experts: ExpertsConfig | None = None
    """Rank, alpha and dropout of the experts, if different."""
    router_init_std: Adjustable[float] = Field(default=0.02, gt=0, le=MAX_NUMBER)
    """Standard deviation of the router's initial weights."""
    router_jitter: Adjustable[float] = Field(default=0.0, ge=0, lt=1)
    """Multiply the router's input by noise in [1 - jitter, 1 + jitter], in training only."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.compat is not None and self.routing not in ("top_p", "switch"):
            yield (
                "compat must be unset where MoE-PEFT computes what the method means, got "
                f"{self.compat} with routing: {self.routing}"
            )

    @property
    def expert_config(self) -> LoraConfig:
        """The experts as a plain LoRA's configuration, with what they inherit filled in."""
        names = DecomposedConfig.model_fields.keys() - {"method"}
        settings = {name: getattr(self, name) for name in names}
        if self.experts is not None:
            settings |= self.experts.model_dump(exclude_none=True)
        return LoraConfig(**settings)

    @property
    def title(self) -> str:
        return f"Mix{self.expert_config.title}"

    @property
    def needs_weights(self) -> bool:
        return self.expert_config.weight_decomposition

    @property
    def route(self) -> Route:
        route = super().route
        if self.compat is not None and isinstance(route, TopP):
            return replace(route, divides_probabilities=True)
        return route

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        return MixLoraAdapter(name, self, base_layers, dtype, seed)

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        super().check_fits(base_layers)
        check_has_experts(self, base_layers)
        adapts_experts = any(base.num_experts for base in self.adapted(base_layers))
        if self.compat is not None and adapts_experts:
            raise AdapterError(
                "compat must be unset on the experts of a base model; leave experts out of "
                "target_modules, or unset it"
            )

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"experts": self.expert_config.summary()}


class MixLoraAdapter(Adapter):
    """A mixture of LoRA experts; with weight decomposition a MixDoRA."""

    config: MixLoraConfig

    def __init__(
        self,
        name: str,
        config: MixLoraConfig,
        base_layers: Sequence[BaseLayer],
        dtype: torch.dtype,
        seed: int,
    ):
        layers = _build_layers(config, base_layers, dtype, seed)
        super().__init__(name, config, base_layers, layers)
        self._routed = config.route
        self._returns_input = config.compat is not None and config.routing == "switch"
        self._chooses_by_route = self.is_as_in(MixLoraAdapter, "choose")
        self._sums_to_one = self._chooses_by_route and self._routed.sums_to_one
        self.dropout_of_ffn = config.expert_config.dropout

    def ffn_weights(self, block: Block, dtype: torch.dtype) -> FfnWeights | ExpertWeights:
        return ffn_weights(self.weights_on(block), block, dtype, self.config.num_experts)

    def ffn(
        self,
        block: Block,
        weights: FfnWeights,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Route the real tokens and compute their experts; padding gets the base's output."""
        dtype = outputs[0].dtype
        routing = self.expert_choice(block, hidden_states, tokens)
        if self._returns_input and tokens.noise is None:
            no_rows = outputs[0].new_empty(0, block.output.in_features)
            return FfnRows(no_rows, lambda output: hidden_states.to(output.dtype))
        dropout = self.ffn_dropout(block, routing.top_k, dtype, tokens)
        rows = lean_expert_ffn(
            hidden_states.to(dtype), outputs, weights, routing, block.gating, dropout
        )
        bias = self._unweighted_bias(block, weights)
        if bias is None:
            return rows
        # Each slot has the bias, so that their sum has it times the sum of the weights.
        excess = routing.routing_weights.sum(1, keepdim=True).to(bias.dtype) - 1
        return FfnRows(rows.hidden, lambda output: rows.finish(output + excess * bias))

    def stack_key(self) -> Hashable:
        computes = self.is_as_in(MixLoraAdapter, "choose", "ffn", "group_low_rank")
        if self._returns_input or not computes or self.adapts_stacks:
            return None
        return type(self.config), self._routed, self._shapes

    @classmethod
    def stack_ffn(
        cls, adapters: Sequence[MixLoraAdapter], block: Block, weights: Sequence[FfnWeights]
    ) -> StackedFfn:
        first = adapters[0]
        routers = [adapter.router(block).detach() for adapter in adapters]
        bias = first._unweighted_bias(block, weights[0])
        return stack_ffn_weights(weights, routers, first._routed, bias)

    def as_moe(self, block: Block) -> MoeFfn:
        if not self._chooses_by_route:
            raise self._no_moe(self.config.title)
        if not self._sums_to_one:
            raise self._no_moe(f"routing: {self.config.routing}")
        projections = self.weights_on(block)

        def weight(expert: int, name: str, dtype: torch.dtype) -> Tensor:
            if name not in projections:
                # a copy, as each expert has its own
                return block.projections[name].weight.to(dtype, copy=True)
            return projections[name].merged(dtype, expert, self.config.num_experts)

        top_k = self.config.experts_per_token or self.config.num_experts
        return MoeFfn(self.router(block).detach(), top_k, weight)

    def router(self, block: Block) -> Tensor:
        return self.layers[block.layer][_router_of(block)].weight  # ty: ignore[not-subscriptable]

    def choose(
        self, block: Block, logits: Tensor, hidden_states: Tensor, tokens: SegmentTokens
    ) -> Choice:
        """Choose each token's experts; see `RoutedProjection.choose`."""
        return *self._routed(logits), {}

    def expert_choice(self, block: Block, hidden_states: Tensor, tokens: SegmentTokens) -> Routing:
        jitter = None
        strength = self.config.router_jitter
        if tokens.noise is not None and strength > 0:
            jitter = tokens.noise.jitter(Site.ROUTER_JITTER, hidden_states.shape[-1], strength)
        logits = router_logits(hidden_states, self.router(block), jitter)
        selected, weights, extra = self.choose(block, logits, hidden_states, tokens)
        # a layer may have a router in an FFN block, and one in the base model's experts
        router = None if block.num_experts is None else block.path
        tokens.record_routing(logits, selected, weights, router, extra)
        # Slots that no token uses are left out, where the device need not be waited for.
        if not self._sums_to_one and weights.device.type == "cpu" and len(weights):
            is_used = weights.detach() != 0  # NaN counts
            num_used = max(1, int(is_used.sum(1).max()))
            selected = selected[:, :num_used]
            weights = weights[:, :num_used]
        beyond = tokens.beyond_capacity(selected, self.config.expert_capacity)
        if beyond is not None:
            selected = selected.masked_fill(beyond, -1)
        if tokens.real is None:
            return Routing(selected, weights)
        # Padding goes to no expert, with the weight 1 in one slot: it gets the base's output.
        real = tokens.real.unsqueeze(1)
        first_slot = torch.zeros_like(weights)
        first_slot[:, 0] = 1
        selected = torch.where(real, selected, -1)
        return Routing(selected, torch.where(real, weights, first_slot))

    def _unweighted_bias(self, block: Block, weights: FfnWeights) -> Tensor | None:
        """The bias of the output, where it is added once and slots' weights don't sum to 1."""
        if self._sums_to_one or weights.apart:
            return None
        return block.output.compute_bias(weights.sides[0].B.dtype)


def _build_layers(
    config: MixLoraConfig, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
) -> list[nn.ModuleDict]:
    expert = config.expert_config

    def build(base: BaseProjection, block: Block) -> Projection:
        if not base.has_weight:
            return RoutedProjection(base, expert, config.num_experts, config.route, dtype, seed)
        if block.gating is None:
            return LoraProjection(base, config, None, dtype, seed)
        if base.num_experts is not None:
            return StackedLoraProjection(base, expert, config.num_experts, dtype, seed)
        return LoraProjection(base, expert, config.num_experts, dtype, seed)

    layers = projection_layers(config, base_layers, build)
    keys = config.targeted_keys(base_layers)
    for block in chain.from_iterable(layer.blocks for layer in base_layers):
        if block.gating is not None and block.names_of(keys):
            layers[block.layer][_router_of(block)] = Router(
                f"layers.{block.layer}.{block.path}.router",
                (config.num_experts, block.hidden_size),
                seed,
                dtype=dtype,
                device=block.device,
                std=config.router_init_std,
            )
    return layers


def _router_of(block: Block) -> str:
    # optimizers know routers' rates by this ending
    return f"{block.module_name}_router"
