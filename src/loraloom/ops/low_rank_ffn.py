"""The FFN block of one adapter's tokens for any method that works in rank space.

Axes: T tokens, D hidden, F feed-forward, P columns of a product with A, S rows of B.

`h = act(gate + Δgate(x)) ∘ (up + Δup(x))`, `y = W_d h + b_d + Δdown(h)`, where each Δ is
`between(A drop(x)) B`. Plain autograd: h is kept for the backward pass, since a router of the
output projection reads it. Where nothing lies between A and B, `lean_expert_ffn.py` computes the
same in less memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights
from loraloom.ops.low_rank import UpProjection, decompose, down_project


def low_rank_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    act: Activation,
    dropout: FfnDropout,
    tokens: Any,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute the rows for the base's output projection, and what to do with its output.

    Args:
        hidden_states: The block's input, [T, D].
        gate: Base output of the gate (or only) input projection, bias included, [T, F].
        up: Base output of up, [T, F]; None in an ungated FFN.
        weights: The adapter's, E = 1.
        act: The base's activation.
        dropout: Masks of the input and of the hidden states.
        tokens: Handed on to `between`.

    Returns:
        h, [T, F], and a function from the base's output for it to the block's output, [T, D].
    """
    low_rank = None
    if weights.input_A is not None:
        keep = dropout.keep_input
        low_rank = down_project(hidden_states, weights.input_A, keep, dropout.probability)

    def rank_input(side: UpProjection | None) -> Tensor | None:
        if side is None or low_rank is None:
            return None
        return side.rank_input(low_rank, hidden_states, tokens)

    gate_rank = rank_input(weights.gate)
    hidden = act(_adapted(gate, gate_rank, weights.gate))
    if up is not None:
        up_rank = gate_rank if weights.is_fused else rank_input(weights.up)
        hidden = hidden * _adapted(up, up_rank, weights.up)
    down = weights.down
    if down is None:
        return hidden, lambda output: output
    down_rank = down_project(hidden, down.A, dropout.keep_slots[0], dropout.probability)
    if down.between is not None:
        down_rank = down.between(down_rank, hidden, tokens)
    return hidden, lambda output: apply_update(
        output, down_rank, down.B, down.row_scale, weights.down_bias
    )


def _adapted(output: Tensor, rank_input: Tensor | None, side: UpProjection | None) -> Tensor:
    if side is None or rank_input is None:
        return output
    return apply_update(output, rank_input, side.B, side.row_scale, side.bias)


def apply_update(
    output: Tensor,
    rank_input: Tensor,
    lora_B: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute `output + rank_input @ B`, or DoRA's `c ∘ (Wx + Δ) + b`; rows are those of a matrix.

    Args:
        output: Base output, bias included, [T, O].
        rank_input: What B multiplies, [T, S].
        lora_B: [S, O].
        row_scale: DoRA's c, [1, O]; None without.
        bias: The base's, [O].
    """
    if row_scale is None:
        return torch.addmm(output, rank_input, lora_B)
    return decompose(output, rank_input @ lora_B, row_scale, bias)
