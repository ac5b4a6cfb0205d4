"""Which way an adapter's FFN block is computed.

`batched`  without gradients and dropout, while all slots' hidden states fit the processor's cache:
           the fewest operations (decoding steps).
`lean`     otherwise: the fewest bytes (training, long prompts).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loraloom.ops.batched_expert_ffn import batched_expert_ffn
from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing
from loraloom.ops.lean_expert_ffn import lean_expert_ffn

BATCHED_BYTES = 1 << 20


def adapter_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    routing: Routing | None,
    act: Activation,
    dropout: FfnDropout | None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn.expert_ffn` computes; see there.

    Args:
        hidden_states: The block's input, [T, D].
        gate: Base output of the gate (or only) input projection, [T, F].
        up: Base output of up, [T, F], or None.
        weights: The adapter's weights.
        routing: Slots of each token; None for a plain LoRA (one expert with weight 1).
        act: The base's activation.
        dropout: Masks; None outside training.
    """
    top_k = 1 if routing is None else routing.top_k
    hidden_bytes = top_k * gate.numel() * gate.element_size()
    if dropout is None and not torch.is_grad_enabled() and hidden_bytes <= BATCHED_BYTES:
        return batched_expert_ffn(hidden_states, gate, up, weights, routing, act)
    masks = dropout or FfnDropout.none(top_k)
    return lean_expert_ffn(hidden_states, gate, up, weights, routing, act, masks)
