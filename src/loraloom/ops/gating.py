"""What lies between the input projections of an FFN block and its output projection.

Axes: T tokens, F feed-forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
# From the outputs of a block's input projections to what its output projection reads, [T, F].
Gating = Callable[..., Tensor]


@dataclass(frozen=True)
class ActivationGating:
    """`act(gate) ∘ up`; `act(up)` where one projection makes no pair.

    Args:
        act: The base's activation.
        is_fused: One projection makes gate and up behind one another, [T, 2F].
    """

    act: Activation
    is_fused: bool = False

    def __call__(self, *outputs: Tensor) -> Tensor:
        if self.is_fused:
            outputs = outputs[0].chunk(2, dim=-1)
        hidden = self.act(outputs[0])
        return hidden if len(outputs) == 1 else hidden * outputs[1]


def gate_with_gradients(
    gating: Gating, outputs: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """Gate, outside of any graph; return the hidden states and their vector-Jacobian product."""
    if torch.compiler.is_compiling():
        return torch.func.vjp(gating, *outputs)  # ty: ignore[invalid-explicit-return]
    # Leaves, so that the graph is as long as the gating.
    with torch.enable_grad():
        leaves = [output.detach().requires_grad_() for output in outputs]
        hidden = gating(*leaves)
    return hidden.detach(), partial(torch.autograd.grad, hidden, leaves)
