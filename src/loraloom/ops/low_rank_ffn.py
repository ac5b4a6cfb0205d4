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

from torch import Tensor

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, are_halves
from loraloom.ops.low_rank import UpProjection, apply_update, down_project


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
    hidden = act(apply_update(gate, gate_rank, weights.gate))
    if up is not None:
        up_rank = gate_rank if are_halves(weights.gate, weights.up) else rank_input(weights.up)
        hidden = hidden * apply_update(up, up_rank, weights.up)
    down = weights.down
    if down is None or weights.down_A is None:
        return hidden, lambda output: output
    down_rank = down_project(hidden, weights.down_A, dropout.keep_slots[0], dropout.probability)
    down_rank = down.rank_input(down_rank, hidden, tokens)
    return hidden, lambda output: apply_update(output, down_rank, down)
