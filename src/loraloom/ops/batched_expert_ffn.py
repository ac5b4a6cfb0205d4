"""The FFN block of a few tokens without gradients: all slots in one batch of rows.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, S = E·R, P columns of the input
product.

The same numbers as `expert_ffn.py`. A decoding step is bound by the count of operations, so slots
are rows of one product instead of turns of a loop: no sort, no loop over experts, no gather.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loraloom.ops.expert_ffn import Activation, FfnWeights, Routing, combine_slots
from loraloom.ops.low_rank import LowRankWeights, UpProjection, decompose, slot_masks


def batched_expert_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    routing: Routing | None,
    act: Activation,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn` computes, without dropout and gradients; see there."""
    slots = _Slots(weights, routing, gate)
    low_rank = None if weights.input_A is None else hidden_states @ weights.input_A.T
    hidden = act(slots.project(gate, low_rank, weights.gate))
    if up is not None:
        hidden = hidden * slots.project(up, low_rank, weights.up)
    down = weights.down
    if down is None:
        return slots.combine(hidden), lambda output: output
    down_rank = slots.mask_rows(hidden @ down.A.T)
    if down.row_scale is None:
        combined = slots.combine(down_rank)
        return slots.combine(hidden), lambda output: torch.addmm(output, combined, down.B)
    return hidden, lambda output: slots.combine(
        _decomposed_down(output, down_rank, down, weights.down_bias, slots)
    )


def _decomposed_down(
    output: Tensor,
    down_rank: Tensor,
    down: LowRankWeights,
    bias: Tensor | None,
    slots: _Slots,
) -> Tensor:
    scale = slots.row_scale(down.row_scale)
    return decompose(output, down_rank @ down.B, scale, bias)


class _Slots:
    """The slots' rows, [K·T, ...], slot by slot."""

    def __init__(self, weights: FfnWeights, routing: Routing | None, gate: Tensor):
        self.num_slots = 1 if routing is None else routing.top_k
        self.masks: Tensor | None = None
        self.weights: Tensor | None = None
        self.experts: Tensor | None = None
        if routing is not None:
            selected = routing.selected_experts
            masks = slot_masks(selected, weights.num_experts, weights.rank, gate.dtype)
            self.masks = masks.flatten(0, 1)  # (K*T, S)
            self.weights = routing.routing_weights.to(gate.dtype).T.unsqueeze(-1)  # (K, T, 1)
            self.experts = selected.T.flatten()

    def project(self, output: Tensor, low_rank: Tensor | None, side: UpProjection | None) -> Tensor:
        """Adapt an input projection for every slot, [K·T, F]."""
        rows = self._repeated(output)
        if low_rank is None or side is None:
            return rows
        masked = self.mask_rows(self._repeated(low_rank[:, side.columns]))
        if side.row_scale is None:
            return torch.addmm(rows, masked, side.B)
        return decompose(rows, masked @ side.B, self.row_scale(side.row_scale), side.bias)

    def row_scale(self, row_scale: Tensor | None) -> Tensor:
        """DoRA's factors of every row's expert; ones for padding (expert -1)."""
        factors: Tensor = row_scale  # pyright: ignore[reportAssignmentType]
        if self.experts is None:
            return factors
        return torch.cat([factors, torch.ones_like(factors[:1])])[self.experts]

    def mask_rows(self, rows: Tensor) -> Tensor:
        """Keep the columns of each row's expert."""
        return rows if self.masks is None else rows * self.masks

    def combine(self, rows: Tensor) -> Tensor:
        """Add up the slots by their weights, [T, ...]."""
        if self.weights is None:
            return rows
        return combine_slots(rows.chunk(self.num_slots), self.weights)

    def _repeated(self, rows: Tensor) -> Tensor:
        return rows if self.num_slots == 1 else rows.repeat(self.num_slots, 1)
