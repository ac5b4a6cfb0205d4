"""MixLoRA and MixDoRA: a router and LoRA experts in each FFN block, LoRA on attention.

Axes: T tokens, D hidden, E experts, K top_k.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, eq. 4-8.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import (
    Adapter,
    FfnRows,
    MoeFfn,
    SampleTokens,
    SegmentTokens,
    check_has_experts,
    resolve_targets,
)
from loraloom.adapters.base import BaseLayer
from loraloom.adapters.lora.weights import LoraProjection
from loraloom.adapters.low_rank import ffn_weights, projection_block
from loraloom.adapters.mixlora.config import MixLoraConfig
from loraloom.adapters.router import Router
from loraloom.ops.dropout import Site
from loraloom.ops.expert_ffn import Activation, FfnWeights, Routing
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from loraloom.ops.stacked import StackedExpertFfn, stack_expert_ffn
from loraloom.routing.losses import AddUp, balance_by_bias, whole
from loraloom.routing.record import LayerRouting
from loraloom.routing.top_k import router_logits, top_k_routing


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
        check_has_experts(config, base_layers[0])
        layers = [
            _build_layer(config, layer, resolve_targets(config, layer), dtype, seed)
            for layer in base_layers
        ]
        super().__init__(name, config, base_layers, layers)
        self._expert_dropout = config.expert_config.dropout
        self._routed = config.route
        self._returns_input = not config.routes_outside_training

    def ffn_weights(self, layer: int, dtype: torch.dtype) -> FfnWeights:
        """See Adapter."""
        base = self.base_layers[layer]
        return ffn_weights(self.ffn_block(layer), base, dtype, self.config.num_experts)

    def ffn(
        self,
        layer: int,
        weights: FfnWeights,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Route the real tokens and compute their experts; padding gets the base's output."""
        if self._returns_input and tokens.noise is None:
            return FfnRows(gate[:0], lambda output: hidden_states.to(output.dtype))
        routing = self._route(layer, hidden_states, tokens)
        dropout = self.ffn_dropout(
            self._expert_dropout, hidden_states.shape[-1], gate, routing.top_k, tokens
        )
        hidden, finish = lean_expert_ffn(
            hidden_states.to(gate.dtype), gate, up, weights, routing, act, dropout
        )
        return FfnRows(hidden, self._with_bias(layer, weights, routing, finish))

    def stack_key(self) -> Hashable:
        """See Adapter."""
        if self._returns_input or self.config.router_bias:
            return None
        return type(self.config), self._routed, self._shapes

    @classmethod
    def stack_ffn(
        cls, adapters: Sequence[MixLoraAdapter], layer: int, weights: Sequence[FfnWeights]
    ) -> StackedExpertFfn:
        """See Adapter."""
        first = adapters[0]
        routers = [adapter.router(layer).detach() for adapter in adapters]
        bias = first._unweighted_bias(layer, weights[0])
        return stack_expert_ffn(weights, routers, first._routed, bias)

    def as_moe(self, layer: int) -> MoeFfn:
        """See Adapter; possible where a token's weights sum to 1."""
        if not self._routed.sums_to_one:
            raise self._no_moe(f"routing: {self.config.routing}")
        if self.config.router_bias:
            raise self._no_moe("router_bias, which such a checkpoint has no place for")
        block, base = self.ffn_block(layer), self.base_layers[layer].ffn

        def weight(expert: int, name: str, dtype: torch.dtype) -> Tensor:
            if name not in block:
                return base[name].weight.to(dtype, copy=True)  # each expert has its own
            return block[name].merged(dtype, expert, self.config.num_experts)

        top_k = self.config.experts_per_token or self.config.num_experts
        return MoeFfn(self.router(layer).detach(), top_k, weight)

    def auxiliary_loss(
        self,
        routing: Sequence[LayerRouting],
        samples: Sequence[SampleTokens] | None = None,
        add_up: AddUp = whole,
    ) -> Tensor | None:
        """See Adapter; biases get their gradient here."""
        loss = super().auxiliary_loss(routing, samples, add_up)
        for record in routing:
            bias = self.router_bias(record.layer)
            if bias is not None and loss is not None:
                loss = loss + balance_by_bias(bias, record.selected_experts, add_up)
        return loss

    def router(self, layer: int) -> Tensor:
        """The router's weight in a layer, [E, D]."""
        return self.layers[layer]["router"].weight  # pyright: ignore

    def router_bias(self, layer: int) -> Tensor | None:
        """What balances the load of a layer's router, [E]; None without."""
        return self.layers[layer]["router"].bias  # pyright: ignore

    def _route(self, layer: int, hidden_states: Tensor, tokens: SegmentTokens) -> Routing:
        jitter = None
        if tokens.noise is not None and self.config.router_jitter > 0:
            jitter = tokens.noise.jitter(
                Site.ROUTER_JITTER, hidden_states.shape[-1], self.config.router_jitter
            )
        logits = router_logits(hidden_states, self.router(layer), jitter)
        bias = self.router_bias(layer)
        if bias is None:
            selected, weights = self._routed(logits)
        else:
            selected, weights = top_k_routing(logits, self.config.top_k, bias.detach().unsqueeze(0))
        tokens.record_routing(logits, selected, weights)
        if not self._routed.sums_to_one:
            selected, weights = _used_slots(selected, weights)
        beyond = tokens.beyond_capacity(selected, self.config.expert_capacity)
        if beyond is not None:
            selected = selected.masked_fill(beyond, -1)
        if tokens.real is None:
            return Routing(selected, weights)
        real = tokens.real.unsqueeze(1)
        first_slot = torch.zeros_like(weights)
        first_slot[:, 0] = 1
        return Routing(torch.where(real, selected, -1), torch.where(real, weights, first_slot))

    def _unweighted_bias(self, layer: int, weights: FfnWeights) -> Tensor | None:
        """The output projection's bias, where it is added once and slots' weights don't sum to 1.

        Each slot has the bias, so that their sum has it times the sum of the weights.
        """
        if self._routed.sums_to_one or weights.apart:
            return None
        base = self.base_layers[layer]
        return base.ffn[base.ffn_shape.output].compute_bias(weights.sides[0].B.dtype)

    def _with_bias(
        self,
        layer: int,
        weights: FfnWeights,
        routing: Routing,
        finish: Callable[[Tensor], Tensor],
    ) -> Callable[[Tensor], Tensor]:
        bias = self._unweighted_bias(layer, weights)
        if bias is None:
            return finish
        excess = routing.routing_weights.sum(1, keepdim=True).to(bias.dtype) - 1
        return lambda output: finish(output + excess * bias)


def _used_slots(selected: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out slots that no token uses, where the device need not be waited for."""
    if weights.device.type != "cpu" or not len(weights):
        return selected, weights
    used = int((weights.detach() != 0).sum(1).max())  # NaN counts
    return selected[:, :used], weights[:, :used]


def _build_layer(
    config: MixLoraConfig,
    layer: BaseLayer,
    targets: frozenset[str],
    dtype: torch.dtype,
    seed: int,
) -> nn.ModuleDict:
    def attention(base, layer):
        return LoraProjection(base, config, None, dtype, seed)

    def experts(base, layer):
        shared = config.shared_config and LoraProjection(
            base, config.shared_config, None, dtype, seed
        )
        return LoraProjection(base, config.expert_config, config.num_experts, dtype, seed, shared)

    router = Router(
        f"layers.{layer.index}.{layer.ffn_block}.router",
        (config.num_experts, layer.hidden_size),
        seed,
        std=config.router_init_std,
        dtype=dtype,
        device=layer.ffn[layer.ffn_shape.inputs[0]].device,
        has_bias=config.router_bias,
    )
    return nn.ModuleDict(
        {
            layer.attention_block: projection_block(layer.attention, targets, layer, attention),
            layer.ffn_block: projection_block(layer.ffn, targets, layer, experts),
            "router": router,
        }
    )
