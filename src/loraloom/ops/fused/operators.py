"""The kernels as operators of PyTorch: tracing, counting and the meta device see each as one.

Axes: T tokens, K slots of a token, F columns, E experts, R rank, S = E·R, P columns of a product,
n parts of a sum. A result that is not asked for is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

# A tile's sides: a program has some eight tiles in registers.
BLOCK_ROWS = BLOCK_COLS = 64


@custom_op("loraloom::expert_hidden", mutates_args=())
def expert_hidden(
    gate: Tensor,
    up: Tensor | None,
    low_rank: Tensor | None,
    experts: Tensor | None,
    routing_weights: Tensor | None,
    gate_B: Tensor | None,
    up_B: Tensor | None,
    keep: Tensor | None,
    starts: list[int],
    rank: int,
    num_columns: int,
    keep_scale: float,
    with_slots: bool,
) -> tuple[Tensor, Tensor]:
    """Compute Σ_j g_j h_j, [T, F], h_j = silu(gate + Δ) ∘ (up + Δ), and drop(h_j), [K·T, F]."""
    # `low_rank`, [T, P], is the product with all A of the input; `starts` are gate's and up's first
    # columns of it. Experts are [K, T], -1 for none; without, all tokens have expert 0.
    hidden, slots = _hidden_results(gate, experts, with_slots)
    _launch(
        "hidden_kernel",
        gate,
        num_columns,
        _block(gate, up, low_rank, experts, routing_weights, gate_B, up_B, starts, rank),
        {"keep": keep, "keep_scale": keep_scale, "hidden": hidden, "slots": _or_none(slots)},
    )
    return hidden, slots


@custom_op("loraloom::expert_hidden_backward", mutates_args=())
def expert_hidden_backward(
    grad_hidden: Tensor,
    grad_rank: Tensor | None,
    down_A: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    low_rank: Tensor | None,
    experts: Tensor | None,
    routing_weights: Tensor | None,
    gate_B: Tensor | None,
    up_B: Tensor | None,
    keep: Tensor | None,
    starts: list[int],
    rank: int,
    num_columns: int,
    keep_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Go back through `expert_hidden`, computing its hidden states again.

    Returns:
        Gradients of gate and up, [T, F]; those of each slot's, [K·T, F], where there are several
        and the projection is adapted; drop(h_j), [K·T, F], where A_d is given; parts of the
        gradients of g, [n, K, T].
    """
    results = _backward_results(gate, up, down_A, experts, routing_weights, gate_B, up_B)
    names = ("grad_gate", "grad_up", "slot_gate", "slot_up", "slots", "weight_sums")
    _launch(
        "hidden_backward_kernel",
        gate,
        num_columns,
        _block(gate, up, low_rank, experts, routing_weights, gate_B, up_B, starts, rank),
        _rows("grad_rank", grad_rank) | _weight("down_A", down_A),
        {"keep": keep, "keep_scale": keep_scale, "grad_hidden": grad_hidden},
        dict(zip(names, map(_or_none, results), strict=True)),
    )
    return results


@expert_hidden.register_fake
def _(gate, up, low_rank, experts, *others):
    return _hidden_results(gate, experts, others[-1])


@expert_hidden_backward.register_fake
def _(grad_hidden, grad_rank, down_A, gate, up, low_rank, experts, weights, gate_B, up_B, *others):
    return _backward_results(gate, up, down_A, experts, weights, gate_B, up_B)


def _hidden_results(gate: Tensor, experts: Any, with_slots: bool) -> tuple[Tensor, Tensor]:
    rows = len(gate) * _num_slots(experts) * with_slots
    return gate.new_empty(gate.shape), gate.new_empty(rows, gate.shape[1])


def _backward_results(gate: Tensor, up, down_A, experts, weights, gate_B, up_B) -> Any:
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


def _or_none(result: Tensor) -> Tensor | None:
    return result if result.numel() else None


def _block(
    gate: Tensor, up, low_rank, experts, weights, gate_B, up_B, starts: list[int], rank: int
) -> dict[str, Any]:
    """What both kernels read, and how they step through it."""
    slot, row = (0, 0) if experts is None else experts.stride()
    weight_row, weight_slot = (0, 0) if weights is None else weights.stride()
    return {
        **_rows("gate", gate), **_weight("gate_B", gate_B), "gate_start": starts[0],
        **_rows("up", up), **_weight("up_B", up_B), "up_start": starts[1],
        **_rows("low_rank", low_rank), "rank": rank, "num_slots": _num_slots(experts),
        "experts": experts, "experts_slot": slot, "experts_row": row,
        "weights": weights, "weights_row": weight_row, "weights_slot": weight_slot,
    }  # fmt: skip


def _rows(name: str, values: Any) -> dict[str, Any]:
    return {name: values, f"{name}_row": 0 if values is None else values.stride(0)}


def _weight(name: str, weight: Any) -> dict[str, Any]:
    strides = (0, 0) if weight is None else weight.stride()
    return {name: weight, f"{name}_row": strides[0], f"{name}_col": strides[1]}


def _launch(name: str, rows: Tensor, num_columns: int, *arguments: dict[str, Any]) -> None:
    if not rows.numel():
        return
    from loraloom.ops.fused import kernels  # Triton is there where it runs

    num_tokens, num_cols = rows.shape
    grid = (-(-num_tokens // BLOCK_ROWS), -(-num_cols // BLOCK_COLS))
    merged = {key: value for part in arguments for key, value in part.items()}
    getattr(kernels, name)[grid](
        **merged,
        num_tokens=num_tokens,
        num_cols=num_cols,
        num_columns=num_columns,
        BLOCK_T=BLOCK_ROWS,
        BLOCK_F=BLOCK_COLS,
        # Columns of rank space that are multiplied at a time: a power of 2 of at least 16.
        BLOCK_S=min(64, max(16, 1 << (num_columns - 1).bit_length())),
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        num_warps=8,
    )
