"""Low-rank products of slots that are sorted by groups of experts.

Axes: T tokens, K top_k, D hidden, E experts, R rank, S = E·R, W columns of a group, C projections
that share an input.

A dense product with all experts' A costs T·D·S; by groups it is K·T·D·W, whatever E is. What is K·T
rows long lies in the order of the groups, so that a group's rows are a view. See `slot_pieces.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.dropout import apply_keep_mask
from loraloom.ops.low_rank import UpProjection, decompose_rows_, excess_of
from loraloom.ops.slot_pieces import Piece, Slots


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
    def forward(ctx, output, low_rank, lora_B, slots, experts):
        ctx.save_for_backward(low_rank, lora_B, experts)
        ctx.slots = slots.without_experts()
        total = output.clone()
        for piece in slots.pieces(output):
            if piece.adapted:
                piece.add(total, piece.take_rank(low_rank) @ piece.of_experts(lora_B))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        low_rank, lora_B, experts = ctx.saved_tensors
        grads = _RankGradients(low_rank, lora_B)
        for piece in ctx.slots.with_experts(experts).pieces(grad):
            if piece.adapted:
                grads.accumulate(piece, piece.take(grad))
        return grad, grads.low_rank, grads.lora_B, None, None


class _GroupedCombine(torch.autograd.Function):
    """Σ_j g_j (c_e ∘ (Wh_j + Δ_j) + b), keeping each Wh_j + Δ_j."""

    @staticmethod
    def forward(ctx, output, low_rank, lora_B, row_scale, bias, slot_weights, slots, experts):
        excess = None if row_scale is None else excess_of(row_scale, output.dtype)
        total = output.new_zeros(len(slot_weights), output.shape[1])
        unscaled = output.clone()
        for piece in slots.pieces(output):
            value = rows = piece.take_slots(unscaled)
            if piece.adapted and lora_B is not None:
                rank_input, own_B = piece.take_rank(low_rank), piece.of_experts(lora_B)
                if excess is None:
                    rows.addmm_(rank_input, own_B)
                else:
                    value = decompose_rows_(rows, rank_input, own_B, piece.of_rows(excess), bias)
            piece.add(total, value, piece.slot_weights(slot_weights))
        ctx.save_for_backward(unscaled, low_rank, lora_B, excess, bias, slot_weights, experts)
        ctx.slots = slots.without_experts()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        unscaled, low_rank, lora_B, excess, bias, slot_weights, experts = ctx.saved_tensors
        grads = None if lora_B is None else _RankGradients(low_rank, lora_B)
        grad_scale = None if excess is None else zeros_for_gradient(excess)
        grad_output, grad_weights = torch.empty_like(unscaled), torch.empty_like(slot_weights)
        for piece in ctx.slots.with_experts(experts).pieces(grad):
            rows, upstream = piece.take_slots(unscaled), piece.take(grad)
            weight, grad_rows, of_bias = piece.slot_weights(slot_weights), upstream, 0
            if grad_scale is not None and piece.adapted:
                grad_rows = torch.addcmul(upstream, piece.of_rows(excess), upstream)
                of_bias = 0 if bias is None else upstream @ bias
                piece.add_row_scale(grad_scale, upstream * rows * weight)
            piece.put_slot_weights(grad_weights, (grad_rows * rows).sum(-1) + of_bias)
            grad_rows = grad_rows * weight
            piece.put_slots(grad_output, grad_rows)
            if grads is not None and piece.adapted:
                grads.accumulate(piece, grad_rows)
        of_rank = (None, None) if grads is None else (grads.low_rank, grads.lora_B)
        return grad_output, *of_rank, grad_scale, None, grad_weights, None, None


class _RankGradients:
    """Gradients of `low_rank @ B_e`, summed up over pieces."""

    def __init__(self, low_rank: Tensor, lora_B: Tensor):
        self._low_rank, self._lora_B = low_rank, lora_B
        self.low_rank, self.lora_B = torch.zeros_like(low_rank), zeros_for_gradient(lora_B)

    def accumulate(self, piece: Piece, grad_rows: Tensor) -> None:
        kept = piece.keep_rank(grad_rows @ piece.of_experts(self._lora_B).T)
        piece.add_rank(self.low_rank, kept)
        own = piece.of_experts(self.lora_B)
        own += piece.take_rank(self._low_rank).T @ grad_rows


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


def grouped_up(output: Tensor, low_rank: Tensor, lora_B: Tensor, slots: Slots) -> Tensor:
    """Compute `output + Σ_j low_rank_j @ B_e` over each token's slots j and experts e, [T, D].

    Args:
        output: [T, D].
        low_rank: Rank-space rows, [K·T, W], zero outside of their expert's columns.
        lora_B: Scaled up-projections, [S, D].
        slots: Sorted by groups.
    """
    return _GroupedUp.apply(output, low_rank, lora_B, slots, slots.experts)  # pyright: ignore


def grouped_combine(
    output: Tensor, low_rank: Tensor, down: UpProjection | None, slot_weights: Tensor, slots: Slots
) -> Tensor:
    """Compute `Σ_j g_j (c_e ∘ (Wh_j + Δ_j) + b)` over each token's slots j, [T, D].

    Args:
        output: The base's `Wh_j + b` of the sorted slots, [K·T, D].
        low_rank: Rank-space rows, [K·T, W], zero outside of their expert's columns.
        down: The output projection; without a row scale c is 1, and None adds nothing.
        slot_weights: g, [T, K].
        slots: Sorted by groups.
    """
    parts = (None, None, None) if down is None else (down.B, down.row_scale, down.bias)
    return _GroupedCombine.apply(  # pyright: ignore[reportReturnType]
        output, low_rank, *parts, slot_weights, slots, slots.experts
    )


def zeros_for_gradient(weight: Tensor) -> Tensor:
    """Room to sum a weight's gradient up in, in float32 or better."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _parts(lora_A: Tensor, slots: Slots) -> Tensor:
    """View the projections apart, [C, S, D]."""
    return lora_A.unflatten(0, (-1, slots.num_experts * slots.rank))
