"""DoRA's sum on an accelerator, `Σ_j g_j (c ∘ (Wx_j + Δ_j) + b)`, in one kernel.

Axes: T tokens, K slots of a token, O out_features, E experts, R rank, S = E·R.

The same as `ops.low_rank.decompose` and a sum over slots. Kept for the backward pass are the base's
output and the rank-space rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from loraloom.ops.fused.operators import decomposed, decomposed_backward
from loraloom.ops.fused.rows import by_slot, over_slots, own_experts, with_rows

if TYPE_CHECKING:
    from loraloom.ops.low_rank import UpProjection


def fused_decompose(
    output: Tensor,
    rank_input: Tensor,
    side: UpProjection,
    rank: int,
    experts: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """Compute `Σ_j g_j (c ∘ (Wx_j + z_j B) + b)`, [T, O].

    Args:
        output: Base output of each slot, [K·T, O].
        rank_input: z of all slots, [T, S]: those of a token have different columns.
        side: B, c and b.
        rank: R.
        experts: Expert of each slot, [K, T]; None for one expert and slot.
        routing_weights: g, [T, K]; None for 1.
    """
    return _FusedDecompose.apply(  # pyright: ignore[reportReturnType]
        with_rows(output), with_rows(rank_input), side.B, side.row_scale, side.bias, experts,
        routing_weights, rank,
    )  # fmt: skip


class _FusedDecompose(Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:-1])
        ctx.rank = arguments[-1]
        return decomposed(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors, rank = ctx.saved_tensors, ctx.rank
        _, rank_input, lora_B, row_scale, _, experts, _ = tensors
        rows, weight_sums, scale_sums = decomposed_backward(grad.contiguous(), *tensors, rank)
        own = None if experts is None else own_experts(experts, len(row_scale))
        grad_B = by_slot(rank_input, own, rank).T @ rows
        grad_rank = over_slots(rows @ lora_B.T, own, rank)
        grad_weights = weight_sums.sum(0).T if weight_sums.numel() else None
        return rows, grad_rank, grad_B, scale_sums.sum(0), None, None, grad_weights, None
