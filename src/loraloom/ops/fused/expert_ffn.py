"""The hidden states of one adapter's FFN block on an accelerator, in one kernel each way.

Axes are `expert_ffn`'s, formulas those of `lean_expert_ffn._LeanFfn`; slots lie one after another
in [K·T, F]. Products that sum over columns or tokens are PyTorch's. The kernel comes as operators
of PyTorch: tracing, counting and the meta device see each as one. There P are columns of a product,
n parts of a sum, and a result that is not asked for is empty.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from loraloom.ops.expert_ffn import FfnDropout, FfnWeights
from loraloom.ops.gating import ActivationGating, Gating

# SiLU's names in torch and transformers, of functions and classes.
_ACTIVATIONS = ("silu", "SiLU", "SiLUActivation")

# Environment variable; `on` lets kernels compute, anything else leaves all to PyTorch.
SWITCH = "LORALOOM_KERNELS"

_HAS_TRITON = find_spec("triton") is not None

# Exact products in float32 have no fast kernel: tiles would not fit into registers.
_DTYPES = (torch.bfloat16, torch.float16)

# A tile's sides: a program has some eight tiles in registers.
BLOCK_ROWS = BLOCK_COLS = 64

# `low_rank`, [T, P], is the product with all A of the input; `starts` are gate's and up's first
# columns of it. Experts are [K, T], -1 for none; without, all tokens have expert 0.
_BLOCK = (
    "Tensor gate, Tensor? up, Tensor? low_rank, Tensor? experts, Tensor? routing_weights, "
    "Tensor? gate_B, Tensor? up_B, Tensor? keep, int[] starts, int rank, int num_columns, "
    "float keep_scale"
)


def is_fused(rows: Tensor) -> bool:
    """Whether rows are on an accelerator with Triton; the meta device stands for one."""
    on_accelerator = rows.is_meta or (rows.is_cuda and _HAS_TRITON)
    return on_accelerator and rows.dtype in _DTYPES and os.environ.get(SWITCH) == "on"


def has_kernels(weights: FfnWeights, gating: Gating) -> bool:
    """Whether kernels know a block: with SiLU, without DoRA, slots added up in front of down."""
    if not isinstance(gating, ActivationGating) or gating.is_fused:
        return False
    name = getattr(gating.act, "__name__", type(gating.act).__name__)
    is_decomposed = any(side.row_scale is not None for side in weights.sides)
    return name in _ACTIVATIONS and not is_decomposed and not weights.apart


def fused_hidden(
    outputs: Sequence[Float[Tensor, "T F"]],
    low_rank: Float[Tensor, "T P"] | None,
    weights: FfnWeights,
    experts: Int[Tensor, "K T"] | None,
    routing_weights: Float[Tensor, "T K"] | None,
    dropout: FfnDropout,
) -> tuple[Float[Tensor, "T F"], Tensor]:
    """Compute Σ_j g_j h_j, and Σ_j g_j drop(h_j) A_dᵀ, [T, S], empty without an A_d."""
    masks = [mask for mask in dropout.keep_slots if mask is not None]
    gate, *ups = outputs
    sides = [*weights.inputs, None][:2]  # there may be no up
    starts = [0 if side is None else side.columns.start for side in sides]
    return _FusedHidden.apply(  # pyright: ignore[reportReturnType]
        (starts, weights.rank, weights.num_experts * weights.rank, dropout.scale),
        _with_rows(gate),
        _with_rows(ups[0]) if ups else None,
        low_rank,
        experts,
        routing_weights,
        *(None if side is None else side.B for side in sides),
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
            down_rank = over_slots((slots if with_slots else hidden) @ down_A.T, weighed, rank)
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


@custom_op(
    "loraloom::expert_hidden",
    mutates_args=(),
    schema=f"({_BLOCK}, bool with_slots) -> (Tensor, Tensor)",
)
def expert_hidden(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute Σ_j g_j h_j, [T, F], h_j = silu(gate + Δ) ∘ (up + Δ), and drop(h_j), [K·T, F]."""
    results = _hidden_results(*arguments)
    _launch(arguments[:-1], (None, None, None), total=results[0], slots=results[1])
    return results


@custom_op(
    "loraloom::expert_hidden_backward",
    mutates_args=(),
    schema=f"(Tensor grad_hidden, Tensor? grad_rank, Tensor? down_A, {_BLOCK}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def expert_hidden_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Go back through `expert_hidden`, computing its hidden states again.

    Returns:
        Gradients of gate and up, [T, F]; those of each slot's, [K·T, F], where there are several
        and the projection is adapted; drop(h_j), [K·T, F], where A_d is given; parts of the
        gradients of g, [n, K, T].
    """
    results = _backward_results(*arguments)
    names = ("total", "total_up", "slot_gate", "slot_up", "slots", "weight_sums")
    _launch(arguments[3:], arguments[:3], **dict(zip(names, results, strict=True)))
    return results


@expert_hidden.register_fake
def _hidden_results(gate, up, low_rank, experts, *others) -> tuple[Tensor, Tensor]:
    rows = len(gate) * _num_slots(experts) * others[-1]  # which is with_slots
    return gate.new_empty(gate.shape), gate.new_empty(rows, gate.shape[1])


@expert_hidden_backward.register_fake
def _backward_results(
    grad_hidden, grad_rank, down_A, gate, up, low_rank, experts, weights, gate_B, up_B, *others
) -> tuple[Tensor, ...]:
    num_tokens, num_cols = gate.shape
    num_slots = _num_slots(experts)

    def rows(count: int, wanted: bool) -> Tensor:
        return gate.new_empty(count * num_tokens if wanted else 0, num_cols)

    num_parts = 0 if weights is None else -(-num_cols // BLOCK_COLS)
    return (
        rows(1, True),
        rows(1, up is not None),
        rows(num_slots, num_slots > 1 and gate_B is not None),
        rows(num_slots, num_slots > 1 and up_B is not None),
        rows(num_slots, down_A is not None),
        gate.new_empty(num_parts, num_slots, num_tokens, dtype=torch.float32),
    )


def _num_slots(experts: Tensor | None) -> int:
    return 1 if experts is None else len(experts)


def _launch(block: tuple[Any, ...], upstream: tuple[Any, ...], **results: Tensor) -> None:
    """Start the kernel, which goes back where something comes from upstream."""
    gate, up, low_rank, experts, weights, gate_B, up_B, keep, starts, rank, num_columns, *_ = block
    grad_hidden, grad_rank, down_A = upstream
    if not gate.numel():
        return
    from loraloom.ops.fused import kernels  # Triton is there where it runs

    num_tokens, num_cols = gate.shape
    grid = (-(-num_tokens // BLOCK_ROWS), -(-num_cols // BLOCK_COLS))
    wanted = dict.fromkeys(("total_up", "slots", "slot_gate", "slot_up", "weight_sums"))
    wanted |= {name: result for name, result in results.items() if result.numel()}
    kernels.hidden_kernel[grid](  # pyright: ignore[reportIndexIssue]
        **_strided("gate", gate, "row"), **_strided("gate_B", gate_B, "row", "col"),
        **_strided("up", up, "row"), **_strided("up_B", up_B, "row", "col"),
        **_strided("low_rank", low_rank, "row"), gate_start=starts[0], up_start=starts[1],
        **_strided("experts", experts, "slot", "row"),
        **_strided("weights", weights, "row", "slot"), keep=keep, keep_scale=block[-1],
        **_strided("grad_rank", grad_rank, "row"), **_strided("down_A", down_A, "row", "col"),
        grad_hidden=grad_hidden, **wanted,
        num_tokens=num_tokens, num_slots=_num_slots(experts), num_cols=num_cols,
        rank=rank, num_columns=num_columns, BLOCK_T=BLOCK_ROWS, BLOCK_F=BLOCK_COLS,
        # Columns of rank space that are multiplied at a time: a power of 2 of at least 16.
        BLOCK_S=min(64, max(16, 1 << (num_columns - 1).bit_length())),
        num_warps=8,
    )  # fmt: skip


def _strided(name: str, values: Tensor | None, *steps: str) -> dict[str, Any]:
    """Arguments of a tensor: itself, and how far apart rows or columns lie in it."""
    pairs = zip(steps, (0, 0) if values is None else values.stride(), strict=False)
    return {name: values, **{f"{name}_{step}": stride for step, stride in pairs}}
