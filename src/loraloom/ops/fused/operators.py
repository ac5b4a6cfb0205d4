"""The kernel as operators of PyTorch: tracing, counting and the meta device see each as one.

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

# `low_rank`, [T, P], is the product with all A of the input; `starts` are gate's and up's first
# columns of it. Experts are [K, T], -1 for none; without, all tokens have expert 0.
_BLOCK = (
    "Tensor gate, Tensor? up, Tensor? low_rank, Tensor? experts, Tensor? routing_weights, "
    "Tensor? gate_B, Tensor? up_B, Tensor? keep, int[] starts, int rank, int num_columns, "
    "float keep_scale"
)


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
    with_slots = others[-1]
    rows = len(gate) * _num_slots(experts) * with_slots
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
    strides = (0, 0) if values is None else values.stride()
    pairs = zip(steps, strides, strict=False)
    return {name: values, **{f"{name}_{step}": stride for step, stride in pairs}}
