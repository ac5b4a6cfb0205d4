"""The kernels as operators of PyTorch: tracing, counting and the meta device see each as one.

Axes: T tokens, K slots of a token, F columns, E experts, R rank, S = E·R, P columns of a product,
n parts of a sum.

Each has an implementation without data, which allocates what it returns, and one that fills it. A
result that is not asked for is empty.
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
    gate_scale: Tensor | None,
    gate_bias: Tensor | None,
    up_B: Tensor | None,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    keep: Tensor | None,
    starts: list[int],
    rank: int,
    num_columns: int,
    act: str,
    keep_scale: float,
    apart: bool,
    with_slots: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the hidden states of an FFN block's slots, h_j = act(gate + Δ) ∘ (up + Δ).

    Args:
        gate: Base output of the gate (or only) input projection, [T, F].
        up: Base output of up, [T, F].
        low_rank: The product with all A of the block's input, [T, P].
        experts: Expert of each slot, [K, T], -1 for none; None where all tokens have expert 0.
        routing_weights: g, [T, K]; None for 1.
        gate_B: Scaled up-projections, [S, F].
        gate_scale: DoRA's factors, [E, F] float32.
        gate_bias: The base's bias, which they leave unscaled.
        up_B: As of gate.
        up_scale: As of gate.
        up_bias: As of gate.
        keep: 1 at what each slot's dropout keeps, [K·T, F].
        starts: First columns of gate and up in `low_rank`.
        rank: R.
        num_columns: S.
        act: Name of the activation.
        keep_scale: What makes up for dropped numbers.
        apart: Slots stay apart.
        with_slots: Give drop(h_j) too.

    Returns:
        Σ_j g_j h_j, [T, F], or h_j, [K·T, F]; and drop(h_j), [K·T, F].
    """
    hidden, slots = _hidden_results(gate, experts, apart, with_slots)
    _launch(
        "hidden_kernel",
        gate,
        num_columns,
        _projection("gate", gate, gate_B, gate_scale, gate_bias)
        | _projection("up", up, up_B, up_scale, up_bias)
        | _rank_space("low_rank", low_rank)
        | _routing(experts, routing_weights),
        {"gate_start": starts[0], "up_start": starts[1], "rank": rank},
        {"keep": keep, "keep_scale": keep_scale, "hidden": hidden, "slots": _or_none(slots)},
        {"ACT": act, "APART": apart},
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
    gate_scale: Tensor | None,
    gate_bias: Tensor | None,
    up_B: Tensor | None,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    keep: Tensor | None,
    starts: list[int],
    rank: int,
    num_columns: int,
    act: str,
    keep_scale: float,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Go back through `expert_hidden`, computing its hidden states again.

    `grad_hidden` is that of the hidden states, [T, F] or [K·T, F], and `grad_rank` that of
    Σ_j g_j drop(h_j) A_dᵀ (apart: without g), [T, S], where `down_A`, [S, F], is A_d.

    Returns:
        Gradients of gate and up, [T, F]; those of each slot's, [K·T, F], where there are several
        and the projection is adapted; drop(h_j), [K·T, F], where A_d is given; parts of the
        gradients of g, [n, K, T], and of both row scales, [n, E, F].
    """
    results = _backward_results(
        gate, up, down_A, experts, routing_weights, gate_B, gate_scale, up_B, up_scale
    )
    names = (
        "grad_gate grad_up slot_gate slot_up slots weight_sums gate_scale_sums up_scale_sums"
    ).split()
    _launch(
        "hidden_backward_kernel",
        gate,
        num_columns,
        _projection("gate", gate, gate_B, gate_scale, gate_bias)
        | _projection("up", up, up_B, up_scale, up_bias)
        | _rank_space("low_rank", low_rank)
        | _rank_space("grad_rank", grad_rank)
        | _weight("down_A", down_A)
        | _routing(experts, routing_weights),
        {"gate_start": starts[0], "up_start": starts[1], "rank": rank},
        {"num_experts": num_columns // rank, "keep": keep, "keep_scale": keep_scale},
        {"grad_hidden": grad_hidden} | dict(zip(names, map(_or_none, results), strict=True)),
        {"ACT": act, "APART": apart},
    )
    return results


@custom_op("loraloom::decomposed", mutates_args=())
def decomposed(
    output: Tensor,
    rank_input: Tensor,
    lora_B: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    experts: Tensor | None,
    routing_weights: Tensor | None,
    rank: int,
) -> Tensor:
    """Compute `Σ_j g_j (c ∘ (Wx_j + z B) + b)`, DoRA's formula.

    Args:
        output: Base output Wx_j + b of each slot, [K·T, O].
        rank_input: z, [T, S]; of a slot the columns of its expert count.
        lora_B: Scaled up-projections, [S, O].
        row_scale: c, [E, O] float32.
        bias: b, [O].
        experts: As in `expert_hidden`.
        routing_weights: As in `expert_hidden`.
        rank: R.

    Returns:
        [T, O].
    """
    total = _decomposed_result(output, experts)
    _launch(
        "decomposed_kernel",
        total,
        len(lora_B),
        _projection("output", output, lora_B, row_scale, bias)
        | _rank_space("rank_input", rank_input)
        | _routing(experts, routing_weights),
        {"rank": rank, "total": total},
    )
    return total


@custom_op("loraloom::decomposed_backward", mutates_args=())
def decomposed_backward(
    grad: Tensor,
    output: Tensor,
    rank_input: Tensor,
    lora_B: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    experts: Tensor | None,
    routing_weights: Tensor | None,
    rank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through `decomposed`, from the gradient of its result, [T, O].

    Returns:
        The gradient of each slot's base output and of its update, [K·T, O]; parts of those of g,
        [n, K, T], and of c, [n, E, O].
    """
    results = _decomposed_backward_results(grad, row_scale, experts, routing_weights)
    names = ("grad_rows", "weight_sums", "scale_sums")
    _launch(
        "decomposed_backward_kernel",
        grad,
        len(lora_B),
        _projection("output", output, lora_B, row_scale, bias)
        | _rank_space("rank_input", rank_input)
        | _routing(experts, routing_weights),
        {"grad": grad, "rank": rank, "num_experts": len(row_scale)},
        dict(zip(names, map(_or_none, results), strict=True)),
    )
    return results


@expert_hidden.register_fake
def _(gate, up, low_rank, experts, *others):
    return _hidden_results(gate, experts, *others[-2:])


@expert_hidden_backward.register_fake
def _(grad_hidden, grad_rank, down_A, gate, up, low_rank, experts, weights, *others):
    gate_B, gate_scale, _, up_B, up_scale = others[:5]
    return _backward_results(gate, up, down_A, experts, weights, gate_B, gate_scale, up_B, up_scale)


@decomposed.register_fake
def _(output, rank_input, lora_B, row_scale, bias, experts, *others):
    return _decomposed_result(output, experts)


@decomposed_backward.register_fake
def _(grad, output, rank_input, lora_B, row_scale, bias, experts, weights, rank):
    return _decomposed_backward_results(grad, row_scale, experts, weights)


def _hidden_results(gate: Tensor, experts: Any, apart: bool, with_slots: bool) -> Any:
    num_tokens, num_cols = gate.shape
    num_slots = _num_slots(experts)
    hidden = gate.new_empty(num_tokens * (num_slots if apart else 1), num_cols)
    return hidden, gate.new_empty(num_tokens * num_slots * with_slots, num_cols)


def _backward_results(
    gate: Tensor, up, down_A, experts, weights, gate_B, gate_scale, up_B, up_scale
) -> Any:
    num_tokens, num_cols = gate.shape
    num_slots = _num_slots(experts)

    def rows(count: int, wanted: bool) -> Tensor:
        return gate.new_empty(count * num_tokens if wanted else 0, num_cols)

    return (
        rows(1, True),
        rows(1, up is not None),
        rows(num_slots, num_slots > 1 and gate_B is not None),
        rows(num_slots, num_slots > 1 and up_B is not None),
        rows(num_slots, down_A is not None),
        _weight_sums(gate, num_slots, weights),
        _scale_sums(gate, num_slots, gate_scale),
        _scale_sums(gate, num_slots, up_scale),
    )


def _decomposed_result(output: Tensor, experts: Any) -> Tensor:
    return output.new_empty(len(output) // _num_slots(experts), output.shape[1])


def _decomposed_backward_results(grad: Tensor, row_scale: Tensor, experts: Any, weights: Any):
    num_slots = _num_slots(experts)
    return (
        grad.new_empty(num_slots * len(grad), grad.shape[1]),
        _weight_sums(grad, num_slots, weights),
        _scale_sums(grad, num_slots, row_scale),
    )


def _num_slots(experts: Tensor | None) -> int:
    return 1 if experts is None else len(experts)


def _weight_sums(rows: Tensor, num_slots: int, weights: Tensor | None) -> Tensor:
    """Room for a sum over each tile's columns."""
    parts = 0 if weights is None else -(-rows.shape[1] // BLOCK_COLS)
    return rows.new_empty(parts, num_slots, len(rows), dtype=torch.float32)


def _scale_sums(rows: Tensor, num_slots: int, row_scale: Tensor | None) -> Tensor:
    """Room for a sum over each tile's rows, by expert."""
    if row_scale is None:
        return rows.new_empty(0, dtype=torch.float32)
    parts = num_slots * -(-len(rows) // BLOCK_ROWS)
    return rows.new_empty(parts, *row_scale.shape, dtype=torch.float32)


def _or_none(result: Tensor) -> Tensor | None:
    return result if result.numel() else None


def _projection(name: str, output: Any, lora_B: Any, row_scale: Any, bias: Any) -> dict[str, Any]:
    """A projection as kernels take it."""
    return {
        name: output,
        f"{name}_row": _row(output),
        **_weight(f"{name}_B", lora_B),
        f"{name}_scale": row_scale,
        f"{name}_scale_row": _row(row_scale),
        f"{name}_bias": bias,
    }


def _weight(name: str, weight: Any) -> dict[str, Any]:
    strides = (0, 0) if weight is None else weight.stride()
    return {name: weight, f"{name}_row": strides[0], f"{name}_col": strides[1]}


def _rank_space(name: str, values: Any) -> dict[str, Any]:
    return {name: values, f"{name}_row": _row(values)}


def _routing(experts: Any, weights: Any) -> dict[str, Any]:
    slot, row = (0, 0) if experts is None else experts.stride()
    weight_row, weight_slot = (0, 0) if weights is None else weights.stride()
    return {
        "experts": experts,
        "experts_slot": slot,
        "experts_row": row,
        "weights": weights,
        "weights_row": weight_row,
        "weights_slot": weight_slot,
        "num_slots": _num_slots(experts),
    }


def _row(rows: Any) -> int:
    return 0 if rows is None else rows.stride(0)


def _launch(name: str, rows: Tensor, num_columns: int, *arguments: dict[str, Any]) -> None:
    """Start a kernel over tiles of [T, F]."""
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
        BLOCK_S=_rank_block(num_columns),
        PRECISION="ieee" if rows.dtype == torch.float32 else "tf32",
        num_warps=8,
    )


def _rank_block(num_columns: int) -> int:
    """Columns of rank space that are multiplied at a time: a power of 2 of at least 16."""
    return min(64, max(16, 1 << (num_columns - 1).bit_length()))
