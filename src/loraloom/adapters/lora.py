"""LoRA and DoRA: one low-rank update on each adapted projection.

Source: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Adapter, BaseLayer, FfnRows, SegmentTokens
from loraloom.adapters.low_rank import low_rank_block
from loraloom.ops.adapter_ffn import adapter_ffn
from loraloom.ops.expert_ffn import Activation


class LoraAdapter(Adapter):
    """A plain LoRA or DoRA adapter."""

    def _build_layer(
        self, layer: BaseLayer, targets: frozenset[str], dtype: torch.dtype
    ) -> nn.ModuleDict:
        blocks = {layer.attention_block: layer.attention, layer.ffn_block: layer.ffn}
        return nn.ModuleDict(
            {
                block: low_rank_block(projections, targets, self.config, None, dtype, self.seed)
                for block, projections in blocks.items()
            }
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
        """Compute the block as a mixture of one expert with weight 1."""
        weights = self._ffn_weights(layer, gate.dtype)
        dropout = self._ffn_dropout(layer, hidden_states.shape[-1], gate, 1, tokens)
        hidden_states = hidden_states.to(gate.dtype)
        hidden, finish = adapter_ffn(hidden_states, gate, up, weights, None, act, dropout)
        return FfnRows(hidden, finish)
