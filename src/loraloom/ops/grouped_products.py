"""Low-rank products of slots that are sorted by groups of experts.

Axes: T tokens, K top_k, D hidden, E experts, R rank, S = E·R, W columns of a group, C projections
that share an input.

A dense product with all experts' A costs T·D·S; by groups it is K·T·D·W, whatever E is. See
`slot_pieces.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.dropout import apply_keep_mask
from loraloom.ops.slot_pieces import Slots


class _GroupedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, lora_A, keep, dropout, slots, experts):
        ctx.save_for_backward(hidden_states, lora_A, keep, experts)
        ctx.dropout, ctx.slots = dropout, slots.without_experts()
        dropped = apply_keep_mask(hidden_states, keep)
        parts = _parts(lora_A, slots)
        low_rank = hidden_states.new_zeros(experts.numel(), len(parts) * slots.columns)
        for piece in slots.pieces(hidden_states):
            if piece.adapted:
                rows = piece.take(dropped) @ piece.of_experts(parts).flatten(0, 1).T
                rows = piece.keep_rank(rows.unflatten(1, (len(parts), -1)).transpose(0, 1))
                piece.add_rank(low_rank, rows.transpose(0, 1).flatten(1))
        return low_rank if keep is None else low_rank * (1 / (1 - dropout))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_states, lora_A, keep, experts = ctx.saved_tensors
        slots = ctx.slots.with_experts(experts)
        dropped = apply_keep_mask(hidden_states, keep)
        grad = grad if keep is None else grad * (1 / (1 - ctx.dropout))
        parts = _parts(lora_A, slots)
        grad_hidden = torch.zeros_like(hidden_states) if ctx.needs_input_grad[0] else None
        grad_A = zeros_for_gradient(lora_A)
        grad_parts = _parts(grad_A, slots)
        for piece in slots.pieces(hidden_states):
            if not piece.adapted:
                continue
            rows = piece.take_rank(grad).unflatten(1, (len(parts), -1)).transpose(0, 1)
            rows = piece.keep_rank(rows).transpose(0, 1).flatten(1)
            if grad_hidden is not None:
                piece.add(grad_hidden, rows @ piece.of_experts(parts).flatten(0, 1))
            own = piece.of_experts(grad_parts)
            own += (rows.T @ piece.take(dropped)).view(own.shape)
        if grad_hidden is not None:
            grad_hidden = apply_keep_mask(grad_hidden, keep)
        return grad_hidden, grad_A, None, None, None, None


class _GroupedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, low_rank, lora_B, slots, experts):
        ctx.save_for_backward(low_rank, lora_B, experts)
        ctx.slots = slots.without_experts()
        output = low_rank.new_zeros(len(low_rank), lora_B.shape[1])
        for piece in slots.pieces(lora_B):
            if piece.adapted:
                piece.put_slots(output, piece.take_rank(low_rank) @ piece.of_experts(lora_B))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        low_rank, lora_B, experts = ctx.saved_tensors
        slots = ctx.slots.with_experts(experts)
        grad_low_rank, grad_B = torch.zeros_like(low_rank), zeros_for_gradient(lora_B)
        for piece in slots.pieces(lora_B):
            if not piece.adapted:
                continue
            rows = piece.take_slots(grad)
            kept = piece.keep_rank(rows @ piece.of_experts(lora_B).T)
            piece.add_rank(grad_low_rank, kept)
            own = piece.of_experts(grad_B)
            own += piece.take_rank(low_rank).T @ rows
        return grad_low_rank, grad_B, None, None


def grouped_down(
    hidden_states: Tensor, lora_A: Tensor, keep: Tensor | None, dropout: float, slots: Slots
) -> Tensor:
    """Compute each slot's `(x * keep / (1 - dropout)) @ A_eᵀ`, [K·T, C·W], for its expert e.

    Args:
        hidden_states: x, [T, D].
        lora_A: Experts' down-projections, one projection after another, [C·S, D].
        keep: 1 at what dropout keeps, [T, D]; None for all.
        dropout: Its probability.
        slots: Sorted by groups.
    """
    return _GroupedDown.apply(  # pyright: ignore[reportReturnType]
        hidden_states, lora_A, keep, dropout, slots, slots.experts
    )


def grouped_up(low_rank: Tensor, lora_B: Tensor, slots: Slots) -> Tensor:
    """Compute each slot's `low_rank @ B_e`, [K·T, D], for its expert e.

    Args:
        low_rank: Rank-space rows, [K·T, W], zero outside of their expert's columns.
        lora_B: Scaled up-projections, [S, D].
        slots: Sorted by groups.
    """
    return _GroupedUp.apply(low_rank, lora_B, slots, slots.experts)  # pyright: ignore


def zeros_for_gradient(weight: Tensor) -> Tensor:
    """Room to sum a weight's gradient up in, in float32 or better."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _parts(lora_A: Tensor, slots: Slots) -> Tensor:
    """View the projections apart, [C, S, D]."""
    return lora_A.unflatten(0, (-1, slots.num_experts * slots.rank))
