"""The hidden states of one adapter's FFN block on an accelerator, in one kernel each way.

Axes: T tokens, F feed-forward, K top_k, E experts, R rank, S = E·R, P columns of the input product.

Formulas, and what is kept for the backward pass, are those of `lean_expert_ffn._LeanFfn`; slots lie
one after another in [K·T, F]. Products that sum over columns or tokens are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights
from loraloom.ops.fused.operators import expert_hidden, expert_hidden_backward
from loraloom.ops.fused.rows import activation_name, by_slot, over_slots, own_experts, with_rows
from loraloom.ops.low_rank import UpProjection


def fused_hidden(
    gate: Tensor,
    up: Tensor | None,
    low_rank: Tensor | None,
    weights: FfnWeights,
    experts: Tensor | None,
    routing_weights: Tensor | None,
    act: Activation,
    dropout: FfnDropout,
) -> tuple[Tensor, Tensor]:
    """Compute the hidden states of all slots, and what the output projection's B multiplies.

    Args:
        gate: Base output of the gate (or only) input projection, [T, F].
        up: Base output of up, [T, F], or None.
        low_rank: The product with all A of the block's input, [T, P].
        weights: The adapter's.
        experts: Expert of each slot, [K, T]; None for a plain LoRA.
        routing_weights: g, [T, K] float32; None where slots stay apart.
        act: The base's activation, one that `activation_name` knows.
        dropout: Masks.

    Returns:
        Σ_j g_j h_j, [T, F], or h_j, [K·T, F]; and Σ_j g_j drop(h_j) A_dᵀ, [T, S] (apart: without
        g, as slots of a token have different columns), empty without an A_d.
    """
    masks = [mask for mask in dropout.keep_slots if mask is not None]
    block = _Block(
        starts=[side.columns.start if side else 0 for side in (weights.gate, weights.up)],
        num_experts=weights.num_experts,
        rank=weights.rank,
        act=activation_name(act) or "",
        keep_scale=dropout.scale,
        apart=weights.apart,
    )
    return _FusedHidden.apply(  # pyright: ignore[reportReturnType]
        block,
        with_rows(gate),
        None if up is None else with_rows(up),
        low_rank,
        *_tensors(weights.gate),
        *_tensors(weights.up),
        weights.down_A,
        routing_weights,
        experts,
        torch.cat(masks) if masks else None,
    )


def _tensors(side: UpProjection | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if side is None else (side.B, side.row_scale, side.bias)


@dataclass(frozen=True)
class _Block:
    """What the function needs besides tensors; see `operators.expert_hidden`."""

    starts: list[int]
    num_experts: int
    rank: int
    act: str
    keep_scale: float
    apart: bool

    @property
    def num_columns(self) -> int:
        """S."""
        return self.num_experts * self.rank

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.starts, self.rank, self.num_columns, self.act, self.keep_scale, self.apart


class _FusedHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, block, gate, up, low_rank, gate_B, gate_c, gate_bias, up_B, up_c, up_bias, down_A,
        routing_weights, experts, keep,
    ):  # fmt: skip
        tensors = (
            gate, up, low_rank, experts, routing_weights,
            gate_B, gate_c, gate_bias, up_B, up_c, up_bias, keep,
        )  # fmt: skip
        # A weighted sum can't be taken apart again, not even that of one slot.
        with_slots = down_A is not None and (routing_weights is not None or keep is not None)
        hidden, slots = expert_hidden(*tensors, *block.settings, with_slots)
        own, down_rank = None, gate.new_empty(0)
        if down_A is not None:
            if experts is not None:
                own = _weighed(own_experts(experts, block.num_experts), routing_weights, gate.dtype)
            slot_rank = (slots if with_slots else hidden) @ down_A.T
            down_rank = over_slots(slot_rank, own, block.rank)
        ctx.block = block
        ctx.save_for_backward(*tensors, down_A, own)
        return hidden, down_rank

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_rank):  # pyright: ignore
        block = ctx.block
        *tensors, down_A, weighed = ctx.saved_tensors
        _, up, low_rank, experts, _, gate_B, _, _, up_B, *_ = tensors
        grad_rank = None if down_A is None else grad_rank.contiguous()
        results = expert_hidden_backward(
            grad_hidden.contiguous(), grad_rank, down_A, *tensors, *block.settings
        )
        grad_gate, grad_up, slot_gate, slot_up, slots, weight_sums, *scale_sums = results
        if experts is None or len(experts) == 1:
            slot_gate, slot_up = grad_gate, grad_up
        grad_A = None
        if grad_rank is not None:
            grad_A = by_slot(grad_rank, weighed, block.rank).T @ slots
        own = None if experts is None else own_experts(experts, block.num_experts)
        sides = zip(block.starts, (gate_B, up_B), (slot_gate, slot_up), strict=True)
        grad_low_rank, grad_gate_B, grad_up_B = _through_B(block, low_rank, own, list(sides))
        grad_gate_c, grad_up_c = (sums.sum(0) if sums.numel() else None for sums in scale_sums)
        grad_weights = weight_sums.sum(0).T if weight_sums.numel() else None
        return (
            None, grad_gate, None if up is None else grad_up, grad_low_rank,
            grad_gate_B, grad_gate_c, None, grad_up_B, grad_up_c, None, grad_A,
            grad_weights, None, None,
        )  # fmt: skip


def _weighed(own: Tensor, routing_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Whose columns each slot has, times its weight, [K, T, E]."""
    if routing_weights is None:
        return own.to(dtype)
    return own * routing_weights.T.unsqueeze(-1).to(dtype)


def _through_B(
    block: _Block,
    low_rank: Tensor | None,
    own: Tensor | None,
    sides: Sequence[tuple[int, Tensor | None, Tensor]],
) -> list[Tensor | None]:
    """Go back through the input projections' B.

    Args:
        block: Sizes.
        low_rank: What they multiplied before it was masked, [T, P].
        own: Whose columns each slot has, [K, T, E]; None without routing.
        sides: First column, B and the slots' gradients, [K·T, F], of each projection.

    Returns:
        Gradients of `low_rank`, and of each B.
    """
    if low_rank is None:
        return [None] * (1 + len(sides))
    rank_input = by_slot(low_rank, own, block.rank)
    grad_rank = torch.empty_like(rank_input)
    grads: list[Tensor | None] = []
    written = set()
    for start, lora_B, slot_grad in sides:
        columns = slice(start, start + block.num_columns)
        if lora_B is None:
            grads.append(None)
            continue
        grads.append(rank_input[:, columns].T @ slot_grad)
        if start in written:  # gate and up share the columns of a fused projection
            grad_rank[:, columns].addmm_(slot_grad, lora_B.T)
        else:
            torch.mm(slot_grad, lora_B.T, out=grad_rank[:, columns])
            written.add(start)
    return [over_slots(grad_rank, own, block.rank), *grads]
