"""Top-k routing: softmax over all experts, keep the k best, renormalise.

Axes: T tokens, D hidden, E experts, K top_k.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _RouterLogits(torch.autograd.Function):
    """`x @ W.T` in the router's dtype, keeping x in its own."""

    @staticmethod
    def forward(ctx, hidden_states, router, jitter):
        ctx.save_for_backward(hidden_states, router, jitter)
        return _router_input(hidden_states, router, jitter) @ router.T

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_states, router, jitter = ctx.saved_tensors
        grad_hidden = grad @ router
        if jitter is not None:
            grad_hidden = grad_hidden * jitter
        grad_router = grad.T @ _router_input(hidden_states, router, jitter)
        return grad_hidden.to(hidden_states.dtype), grad_router, None


def _router_input(hidden_states: Tensor, router: Tensor, jitter: Tensor | None) -> Tensor:
    wide = hidden_states.to(router.dtype)
    return wide if jitter is None else wide * jitter


def router_logits(
    hidden_states: Float[Tensor, "T D"],
    router: Float[Tensor, "E D"],
    jitter: Float[Tensor, "T D"] | None = None,
) -> Float[Tensor, "T E"]:
    """Compute `(hidden_states * jitter) @ router.T` in float32 (float64 for a float64 router)."""
    return _RouterLogits.apply(hidden_states, router, jitter)  # pyright: ignore


def top_k_routing(
    logits: Float[Tensor, "T E"], top_k: int, bias: Float[Tensor, "#T E"] | None = None
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """Choose each token's k most probable experts and renormalise their probabilities to sum 1.

    Softmax keeps the order of the logits, and its renormalised part is the softmax of that part.

    Source:
        Li et al. 2024, MixLoRA, arXiv:2404.15159, eq. 5-6; as in MoE-PEFT 2.0.2. The bias: Wang et
        al. 2024, Auxiliary-Loss-Free Load Balancing, arXiv:2408.15664.
    """
    if bias is None:
        chosen, selected = logits.topk(top_k, dim=-1)
    else:
        selected = (logits.detach() + bias).topk(top_k, dim=-1).indices
        chosen = logits.gather(-1, selected)
    return selected, chosen.softmax(-1)
