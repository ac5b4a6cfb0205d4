"""MixLoRA and MixDoRA: a router and LoRA experts in each FFN block, LoRA on attention.

Axes: T tokens, D hidden, E experts, K top_k.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, eq. 4-8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Adapter, BaseLayer, FfnRows, SegmentTokens
from loraloom.adapters.low_rank import generator_for, low_rank_block
from loraloom.config.adapter import MixLoraConfig
from loraloom.errors import AdapterError
from loraloom.ops.adapter_ffn import adapter_ffn
from loraloom.ops.dropout import Site
from loraloom.ops.expert_ffn import Activation, Routing
from loraloom.routing.record import LayerRouting
from loraloom.routing.top_k import router_logits, top_k_routing


class Router(nn.Module):
    """The linear gate of one layer; weight [E, D], normal with a small deviation at first."""

    def __init__(self, shape: tuple[int, int], std: float, dtype, device, key: str, seed: int):
        super().__init__()
        initial = torch.empty(shape).normal_(std=std, generator=generator_for(seed, key))
        self.weight = nn.Parameter(initial.to(dtype=dtype, device=device))


class MixLoraAdapter(Adapter):
    """A mixture of LoRA experts; with weight decomposition a MixDoRA.

    Raises:
        AdapterError: If `target_modules` has no projection of the FFN block.
    """

    config: MixLoraConfig

    def _build_layer(
        self, layer: BaseLayer, targets: frozenset[str], dtype: torch.dtype
    ) -> nn.ModuleDict:
        if not targets & frozenset(layer.ffn):
            raise AdapterError(
                f"a mixture needs experts: target_modules must have at least one of "
                f"{', '.join(layer.ffn)}, got {', '.join(sorted(targets))}"
            )
        config = self.config
        router = Router(
            (config.num_experts, layer.hidden_size),
            config.router_init_std,
            dtype,
            layer.ffn[layer.ffn_shape.inputs[0]].device,
            f"layers.{layer.index}.{layer.ffn_block}.router",
            self.seed,
        )
        attention = low_rank_block(layer.attention, targets, config, None, dtype, self.seed)
        experts = low_rank_block(
            layer.ffn, targets, config.expert_config, config.num_experts, dtype, self.seed
        )
        return nn.ModuleDict(
            {layer.attention_block: attention, layer.ffn_block: experts, "router": router}
        )

    def ffn(
        self,
        layer: int,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Route the real tokens and compute their experts; padding gets the base's output."""
        routing, record = self._route(layer, hidden_states, tokens)
        weights = self._ffn_weights(layer, gate.dtype)
        dropout = self._ffn_dropout(layer, hidden_states.shape[-1], gate, self.config.top_k, tokens)
        hidden, finish = adapter_ffn(
            hidden_states.to(gate.dtype), gate, up, weights, routing, act, dropout
        )
        return FfnRows(hidden, finish, record)

    def _route(
        self, layer: int, hidden_states: Tensor, tokens: SegmentTokens
    ) -> tuple[Routing, LayerRouting]:
        jitter = None
        if tokens.noise is not None and self.config.router_jitter > 0:
            jitter = tokens.noise.jitter(
                Site.ROUTER_JITTER, hidden_states.shape[-1], self.config.router_jitter
            )
        logits = router_logits(hidden_states, self.router(layer), jitter)
        selected, weights = top_k_routing(logits, self.config.top_k)
        if tokens.real is None or tokens.real_index is None:
            return Routing(selected, weights), LayerRouting(layer, logits, selected, weights)
        record = LayerRouting(
            layer, *(values[tokens.real_index] for values in (logits, selected, weights))
        )
        real = tokens.real.unsqueeze(1)
        first_slot = torch.zeros_like(weights)
        first_slot[:, 0] = 1
        routing = Routing(torch.where(real, selected, -1), torch.where(real, weights, first_slot))
        return routing, record
