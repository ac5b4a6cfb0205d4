"""Which way an adapter's FFN block is computed.

`triton`   on a GPU with Triton, where its kernels know the activation and dtype and the experts'
           ranks are few enough: the fewest passes over memory.
`lean`     otherwise; `slot_pieces.py` says whether by masks or by groups of experts.

Small forwards without gradients are computed by `stacked.py`, for several adapters at once.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing
from loraloom.ops.lean_expert_ffn import lean_expert_ffn
from loraloom.ops.triton_expert_ffn import fits_triton, triton_expert_ffn


def adapter_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    routing: Routing | None,
    act: Activation,
    dropout: FfnDropout,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn.expert_ffn` computes; see there.

    Args:
        hidden_states: The block's input, [T, D].
        gate: Base output of the gate (or only) input projection, [T, F].
        up: Base output of up, [T, F], or None.
        weights: The adapter's weights.
        routing: Slots of each token; None for a plain LoRA (one expert with weight 1).
        act: The base's activation.
        dropout: Masks.
    """
    ffn = triton_expert_ffn if fits_triton(gate, weights, act) else lean_expert_ffn
    return ffn(hidden_states, gate, up, weights, routing, act, dropout)
