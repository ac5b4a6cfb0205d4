"""The hidden states of one adapter's FFN block on an accelerator, in one kernel each way.

Axes are `expert_ffn`'s, formulas those of `lean_expert_ffn._LeanFfn`; slots lie one after another
in [K·T, F]. Products that sum over columns or tokens are PyTorch's.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights
from loraloom.ops.fused.operators import expert_hidden, expert_hidden_backward

# SiLU's names in torch and transformers, of functions and classes.
_ACTIVATIONS = ("silu", "SiLU", "SiLUActivation")

# Environment variable; `on` lets kernels compute, anything else leaves all to PyTorch.
SWITCH = "LORALOOM_KERNELS"

_HAS_TRITON = find_spec("triton") is not None

# Exact products in float32 have no fast kernel: tiles would not fit into registers.
_DTYPES = (torch.bfloat16, torch.float16)


def is_fused(rows: Tensor) -> bool:
    """Whether rows are on an accelerator with Triton; the meta device stands for one."""
    on_accelerator = rows.is_meta or (rows.is_cuda and _HAS_TRITON)
    return on_accelerator and rows.dtype in _DTYPES and os.environ.get(SWITCH) == "on"


def has_kernels(weights: FfnWeights, act: Activation) -> bool:
    """Whether kernels know a block: with SiLU, without DoRA, slots added up in front of down."""
    name = getattr(act, "__name__", type(act).__name__)
    is_decomposed = any(side.row_scale is not None for side in weights.sides)
    return name in _ACTIVATIONS and not is_decomposed and not weights.apart


def fused_hidden(
    gate: Float[Tensor, "T F"],
    up: Float[Tensor, "T F"] | None,
    low_rank: Float[Tensor, "T P"] | None,
    weights: FfnWeights,
    experts: Int[Tensor, "K T"] | None,
    routing_weights: Float[Tensor, "T K"] | None,
    dropout: FfnDropout,
) -> tuple[Float[Tensor, "T F"], Tensor]:
    """Compute Σ_j g_j h_j, and Σ_j g_j drop(h_j) A_dᵀ, [T, S], empty without an A_d."""
    # `low_rank` is the product with all A of the input; a plain LoRA has no experts and no g.
    masks = [mask for mask in dropout.keep_slots if mask is not None]
    sides = (weights.gate, weights.up)
    starts = [side.columns.start if side else 0 for side in sides]
    num_columns = weights.num_experts * weights.rank
    return _FusedHidden.apply(  # pyright: ignore[reportReturnType]
        (starts, weights.rank, num_columns, dropout.scale),
        _with_rows(gate),
        None if up is None else _with_rows(up),
        low_rank,
        experts,
        routing_weights,
        *(side and side.B for side in sides),
        torch.cat(masks) if masks else None,
        weights.down_A,
    )


class _FusedHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, settings, gate, up, low_rank, experts, routing_weights, gate_B, up_B, keep, down_A
    ):
        tensors = (gate, up, low_rank, experts, routing_weights, gate_B, up_B, keep)
        # A weighted sum can't be taken apart again, not even that of one slot.
        with_slots = down_A is not None and (experts is not None or keep is not None)
        hidden, slots = expert_hidden(*tensors, *settings, with_slots)
        _, rank, num_columns, *_ = settings
        weighed, down_rank = None, gate.new_empty(0)
        if down_A is not None:
            if experts is not None:
                weights = routing_weights.T.unsqueeze(-1).to(gate.dtype)
                weighed = own_experts(experts, num_columns // rank) * weights
            slot_rank = (slots if with_slots else hidden) @ down_A.T
            down_rank = over_slots(slot_rank, weighed, rank)
        ctx.settings = settings
        ctx.save_for_backward(*tensors, down_A, weighed)
        return hidden, down_rank

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_rank):  # pyright: ignore
        starts, rank, num_columns, *_ = ctx.settings
        *tensors, down_A, weighed = ctx.saved_tensors
        _, up, low_rank, experts, _, gate_B, up_B, _ = tensors
        grad_rank = None if down_A is None else grad_rank.contiguous()
        grad_gate, grad_up, slot_gate, slot_up, slots, weight_sums = expert_hidden_backward(
            grad_hidden.contiguous(), grad_rank, down_A, *tensors, *ctx.settings
        )
        if experts is None or len(experts) == 1:
            slot_gate, slot_up = grad_gate, grad_up
        grad_A = None
        if grad_rank is not None:
            grad_A = by_slot(grad_rank, weighed, rank).T @ slots
        grad_low_rank, grads_B = None, [None, None]
        if low_rank is not None:
            own = None if experts is None else own_experts(experts, num_columns // rank)
            rank_input = by_slot(low_rank, own, rank)
            grad_rank = torch.zeros_like(rank_input)
            for index, (lora_B, grad) in enumerate(((gate_B, slot_gate), (up_B, slot_up))):
                if lora_B is not None:  # gate and up share the columns of a fused projection
                    columns = slice(starts[index], starts[index] + num_columns)
                    grads_B[index] = rank_input[:, columns].T @ grad
                    grad_rank[:, columns].addmm_(grad, lora_B.T)
            grad_low_rank = over_slots(grad_rank, own, rank)
        grad_weights = weight_sums.sum(0).T if weight_sums.numel() else None
        return (
            None, grad_gate, None if up is None else grad_up, grad_low_rank, None, grad_weights,
            *grads_B, None, grad_A,
        )  # fmt: skip


def _with_rows(values: Tensor) -> Tensor:
    """Kernels step from row to row by any stride, and within a row by 1."""
    return values if values.stride(-1) == 1 else values.contiguous()


def own_experts(experts: Int[Tensor, "K T"], num_experts: int) -> Shaped[Tensor, "K T E"]:
    """Tell whose columns each slot has; expert -1 has none."""
    return experts.unsqueeze(-1) == torch.arange(num_experts, device=experts.device)


def by_slot(
    rows: Float[Tensor, "T P"], own: Shaped[Tensor, "K T E"] | None, rank: int
) -> Float[Tensor, "N P"]:
    """Spread rank-space rows over slots, [K·T, C·S], times what each slot has of an expert."""
    if own is None:
        return rows
    experts = rows.view(len(rows), -1, own.shape[-1], rank)
    return (experts * own[:, :, None, :, None]).reshape(-1, rows.shape[1])


def over_slots(
    rows: Float[Tensor, "N P"], own: Shaped[Tensor, "K T E"] | None, rank: int
) -> Float[Tensor, "T P"]:
    """Add up what `by_slot` spreads: a token's slots, times what each has of an expert."""
    if own is None:
        return rows
    num_slots, num_tokens, num_experts = own.shape
    experts = rows.view(num_slots, num_tokens, -1, num_experts, rank)
    return (experts * own[:, :, None, :, None]).sum(0).reshape(num_tokens, -1)
