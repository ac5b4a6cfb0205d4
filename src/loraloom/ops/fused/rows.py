"""Where kernels compute, rank-space rows of slots, and DoRA's sum in one kernel.

Axes: T tokens, K slots of a token, O out_features, E experts, R rank, S = E·R, C projections side
by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from loraloom.ops.fused.operators import decomposed, decomposed_backward

# Kernels' names of activations by those of torch's and transformers' classes and functions.
ACTIVATIONS: Mapping[str, str] = {
    "SiLU": "silu",
    "silu": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
}

# Environment variable; `on` lets kernels compute, anything else leaves all to PyTorch.
SWITCH = "LORALOOM_KERNELS"

# Exact products in float32 have no fast kernel: tiles would not fit into registers.
_DTYPES = (torch.bfloat16, torch.float16)


def is_fused(rows: Tensor) -> bool:
    """Whether kernels compute on these rows: on an accelerator with Triton.

    The meta device stands for one.
    """
    on_accelerator = rows.is_meta or (rows.is_cuda and _has_triton())
    return on_accelerator and rows.dtype in _DTYPES and os.environ.get(SWITCH) == "on"


def activation_name(act: Callable[[Tensor], Tensor]) -> str | None:
    """Return what kernels call an activation; None if they don't know it."""
    return ACTIVATIONS.get(type(act).__name__) or ACTIVATIONS.get(getattr(act, "__name__", ""))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def with_rows(values: Tensor) -> Tensor:
    """Kernels step from row to row by any stride, and within a row by 1."""
    return values if values.stride(-1) == 1 else values.contiguous()


def own_experts(experts: Int[Tensor, "K T"], num_experts: int) -> Shaped[Tensor, "K T E"]:
    """Tell whose columns each slot has; expert -1 has none."""
    return experts.unsqueeze(-1) == torch.arange(num_experts, device=experts.device)


def by_slot(
    rows: Float[Tensor, "T P"], own: Shaped[Tensor, "K T E"] | None, rank: int
) -> Float[Tensor, "N P"]:
    """Spread rank-space rows over slots, [K·T, C·S], times what each slot has of an expert.

    Args:
        rows: [T, C·S].
        own: See `own_experts`, or its product with routing weights; None without routing.
        rank: R.
    """
    if own is None:
        return rows
    experts = rows.view(len(rows), -1, own.shape[-1], rank)
    return (experts * own[:, :, None, :, None]).reshape(-1, rows.shape[1])


def over_slots(
    rows: Float[Tensor, "N P"], own: Shaped[Tensor, "K T E"] | None, rank: int
) -> Float[Tensor, "T P"]:
    """Add up the rank-space rows of a token's slots, times what each slot has of an expert.

    Args:
        rows: [K·T, C·S].
        own: As in `by_slot`.
        rank: R.
    """
    if own is None:
        return rows
    num_slots, num_tokens, num_experts = own.shape
    experts = rows.view(num_slots, num_tokens, -1, num_experts, rank)
    return (experts * own[:, :, None, :, None]).sum(0).reshape(num_tokens, -1)


def fused_decompose(
    output: Tensor,
    rank_input: Tensor,
    lora_B: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    rank: int,
    experts: Tensor | None = None,
    routing_weights: Tensor | None = None,
) -> Tensor:
    """Compute `Σ_j g_j (c ∘ (Wx_j + z_j B) + b)`, [T, O], in one kernel.

    The same as `ops.low_rank.decompose` and a sum over slots. Kept for the backward pass are the
    base's output and the rank-space rows.

    Args:
        output: Base output of each slot, [K·T, O].
        rank_input: z of all slots, [T, S]: those of a token have different columns.
        lora_B: Scaled up-projections B, [S, O].
        row_scale: c, [E, O] float32.
        bias: b, [O].
        rank: R.
        experts: Expert of each slot, [K, T]; None for one expert and slot.
        routing_weights: g, [T, K]; None for 1.
    """
    return _FusedDecompose.apply(  # pyright: ignore[reportReturnType]
        with_rows(output), with_rows(rank_input), lora_B, row_scale, bias, experts,
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
