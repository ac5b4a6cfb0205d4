"""Products of slots with their experts' weights, piece by piece; axes are `slot_pieces.py`'s.

A dense product with all experts' A costs T·D·S; by groups it is K·T·D·W, whatever E is. What is K·T
rows long lies in the order of the groups, so that a group's rows are a view.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.dropout import apply_keep_mask, draw_mask
from loraloom.ops.fused import fused_on_accelerators, without_graph
from loraloom.ops.low_rank import add_product_over_tokens_, decompose_rows, excess_of
from loraloom.ops.slot_pieces import Piece, Slots, Total


class GroupedDown(torch.autograd.Function):
    """Each slot's `(x * keep / (1 - dropout)) @ A_eᵀ`, [K·T, C·W], for its expert e, by groups."""

    # `lora_A`, [C·S, D], has one after another the C projections that share an input.

    @staticmethod
    def forward(ctx, hidden_states, lora_A, keep, dropout, slots):
        ctx.save_for_backward(hidden_states, lora_A)
        ctx.keep = keep
        ctx.dropout = dropout
        ctx.slots = slots
        dropped = apply_keep_mask(hidden_states, draw_mask(keep))
        groups_A = _by_group(lora_A, slots)
        low_rank = hidden_states.new_zeros(slots.experts.numel(), groups_A.shape[1])
        for piece in slots.by_group:
            if piece.columns is not None:
                rows = piece.take(dropped) @ groups_A[piece.group].T
                piece.add_rank(low_rank, piece.keep_rank(rows))
        if keep is None:
            return low_rank
        return low_rank * (1 / (1 - dropout))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_states, lora_A = ctx.saved_tensors
        keep = draw_mask(ctx.keep)
        dropped = apply_keep_mask(hidden_states, keep)
        if keep is not None:
            grad = grad * (1 / (1 - ctx.dropout))
        groups_A = _by_group(lora_A, ctx.slots)
        grad_hidden = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden_states)
        grad_groups_A = zeros_for_gradient(groups_A)
        for piece in ctx.slots.by_group:
            if piece.columns is None:
                continue
            rows = piece.keep_rank(piece.take_rank(grad))
            if grad_hidden is not None:
                piece.add(grad_hidden, rows @ groups_A[piece.group])
            add_product_over_tokens_(grad_groups_A[piece.group], rows, piece.take(dropped))
        if grad_hidden is not None:
            grad_hidden = apply_keep_mask(grad_hidden, keep)
        grad_A = grad_groups_A.unflatten(1, (-1, ctx.slots.columns)).transpose(0, 1)
        return grad_hidden, grad_A.reshape(lora_A.shape), None, None, None


class GroupedUp(torch.autograd.Function):
    """`output + Σ_j low_rank_j @ B_e`, in place; rows are zero outside their expert's columns."""

    @staticmethod
    def forward(ctx, output, low_rank, lora_B, slots):
        ctx.save_for_backward(low_rank, lora_B)
        ctx.slots = slots
        ctx.mark_dirty(output)
        for piece in slots.by_group:
            if piece.columns is not None:
                rank_input = piece.take_rank(low_rank)
                piece.add(output, rank_input @ piece.of_experts(lora_B))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        low_rank, lora_B = ctx.saved_tensors
        grads = RankGradients(lora_B, torch.zeros_like(low_rank))
        for piece in ctx.slots.by_group:
            if piece.columns is not None:
                grads.add(piece, piece.take_rank(low_rank), piece.take(grad))
        return grad, grads.low_rank, grads.lora_B, None


class CombineSlots(torch.autograd.Function):
    """Σ_j g_j (c_e ∘ (Wh_j + Δ_j) + b) of the base's `Wh_j + b`, keeping each Wh_j + Δ_j."""

    @staticmethod
    def forward(ctx, output, low_rank, lora_B, row_scale, bias, slot_weights, slots):
        excess = excess_rows(row_scale, output.dtype)
        tensors = without_graph([output, low_rank, lora_B, excess, bias, slot_weights])
        total, unscaled = _combine(*tensors, slots)  # ty: ignore[invalid-argument-type]
        ctx.save_for_backward(unscaled, low_rank, lora_B, excess, bias, slot_weights)
        ctx.slots = slots
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients = _combine_gradients(grad, *ctx.saved_tensors, ctx.slots)
        grad_output, grad_low_rank, grad_B, grad_scale, grad_weights = gradients
        return grad_output, grad_low_rank, grad_B, grad_scale, None, grad_weights, None


@fused_on_accelerators
def _combine(
    output: Tensor,
    low_rank: Tensor,
    lora_B: Tensor,
    excess: Tensor,
    bias: Tensor | None,
    slot_weights: Tensor | None,
    slots: Slots,
) -> tuple[Tensor, Tensor]:
    total = Total(slots, output.shape[1], output)
    unscaled = torch.empty_like(output)
    ordered = slots.by_place(slot_weights)
    for piece in slots.pieces(output.shape[1], output.dtype):
        rows = piece.take_slots(output)
        out = piece.take_slots(unscaled)
        if piece.columns is None:
            value = out.copy_(rows)
        else:
            rank_input = piece.take_rank(low_rank)
            piece_B = piece.of_experts(lora_B)
            row_excess = piece.of_rows(excess)
            value, _ = decompose_rows(rows, rank_input, piece_B, row_excess, bias, out)
        weight = None if ordered is None else piece.take_slots(ordered)
        total.add(piece, value, weight)
    return total.value, unscaled


@fused_on_accelerators
def _combine_gradients(
    grad: Tensor,
    unscaled: Tensor,
    low_rank: Tensor,
    lora_B: Tensor,
    excess: Tensor,
    bias: Tensor | None,
    slot_weights: Tensor | None,
    slots: Slots,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    grads = RankGradients(lora_B, torch.zeros_like(low_rank))
    grad_scale = zeros_for_gradient(excess[:-1])
    ordered = slots.by_place(slot_weights)
    grad_weights = None if ordered is None else torch.empty_like(ordered)
    grad_output = torch.empty_like(unscaled)
    for piece in slots.pieces(grad.shape[1], grad.dtype):
        rows = piece.take_slots(unscaled)
        upstream = grad_rows = piece.take(grad)
        weight = 1 if ordered is None else piece.take_slots(ordered)
        grad_bias = None
        is_adapted = piece.columns is not None
        if is_adapted:
            # The bias is in what g multiplies, and not in what c does.
            grad_rows = torch.addcmul(upstream, piece.of_rows(excess), upstream)
            if bias is not None:
                grad_bias = upstream @ bias[:, None]
            piece.add_row_scale(grad_scale, upstream * rows * weight)
        if grad_weights is not None:
            grad_weight = (grad_rows * rows).sum(-1, keepdim=True)
            if grad_bias is not None:
                grad_weight = grad_weight + grad_bias
            piece.take_slots(grad_weights).copy_(grad_weight)
        grad_rows = torch.mul(grad_rows, weight, out=piece.take_slots(grad_output))
        if is_adapted:
            grads.add(piece, piece.take_rank(low_rank), grad_rows)
    return grad_output, grads.low_rank, grads.lora_B, grad_scale, slots.by_token(grad_weights)


class RankGradients:
    """Gradients of `rank_input @ B_e`, summed up over pieces; `low_rank` is room for the first."""

    def __init__(self, lora_B: Tensor, low_rank: Tensor):
        self._weight = lora_B
        self.low_rank = low_rank
        self.lora_B = zeros_for_gradient(lora_B)

    def add(self, piece: Piece, rank_input: Tensor, grad_rows: Tensor) -> None:
        grad_rank = grad_rows @ piece.of_experts(self._weight).T
        piece.add_rank(self.low_rank, piece.keep_rank(grad_rank))
        add_product_over_tokens_(piece.of_experts(self.lora_B), rank_input, grad_rows)


def excess_rows(row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """DoRA's factors less 1, with a row of zeros at the end, which expert -1 (padding) indexes."""
    padding = torch.ones_like(row_scale[:1])
    return excess_of(torch.cat([row_scale, padding]), dtype)


def zeros_for_gradient(weight: Tensor) -> Tensor:
    """Room to sum a weight's gradient up in, in float32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros_like(weight, dtype=dtype)


def _by_group(lora_A: Tensor, slots: Slots) -> Tensor:
    """Copy A, [C·S, D], to where each group's rows lie together, [S / W, C·W, D]."""
    num_groups = slots.num_experts * slots.rank // slots.columns
    groups = lora_A.unflatten(0, (-1, num_groups, slots.columns))  # (C, S / W, W, D)
    return groups.transpose(0, 1).flatten(1, 2)
