"""Losses on the router, over the real tokens of one micro-batch.

Axes: T tokens (of all layers where pooled), E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from loraloom.routing.record import LayerRouting

_BIAS_GRADIENT = 1e-3
"""Factor of the gradients of biases: too small to count in an adapter's norm."""


def load_balance_loss(
    router_logits: Float[Tensor, "T E"],
    selected_experts: Int[Tensor, "T K"],
    is_used: Bool[Tensor, "T K"] | None = None,
) -> Float[Tensor, ""]:
    """Compute `E · Σ_j Σ_n f[j, n] · P[n]`, which is at least K and reaches it when balanced.

    f[j, n] is the share of tokens whose slot j went to expert n (no gradient), P[n] the mean
    probability of n. K is the mean number of experts that a token uses, where it differs.

    Args:
        router_logits: Raw router outputs of the real tokens.
        selected_experts: Their chosen experts.
        is_used: Whether a token uses each of them; None: it does.

    Source:
        Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, eq. 4-6, summed over slots as in
        MoE-PEFT 2.0.2 (`MixtralRouterLoss`).
    """
    num_experts = router_logits.shape[-1]
    num_tokens = max(1, len(router_logits))  # no tokens cost nothing
    chosen = one_hot(selected_experts, num_experts).to(router_logits.dtype)
    if is_used is not None:
        chosen = chosen * is_used.unsqueeze(-1)
    share = chosen.sum(0)  # (K, E)
    probability = router_logits.softmax(-1).sum(0)
    return num_experts * (share * probability).sum() / num_tokens**2


def balance_by_bias(
    bias: Float[Tensor, " E"], selected_experts: Int[Tensor, "T K"]
) -> Float[Tensor, ""]:
    """Let an optimizer move a router's bias against the load: a loss that is 0 wherever it is.

    Its gradient is c·(f[n] - 1/E), f[n] the share of choices that went to expert n, so that Adam,
    for which the factor c does not matter, lowers the bias of an expert with more than an even
    share and raises that of one with less. c is small, for the norm by which gradients are clipped.

    Args:
        bias: Added to the router's logits where experts are chosen.
        selected_experts: Chosen experts of the real tokens.

    Source:
        Wang et al. 2024, Auxiliary-Loss-Free Load Balancing, arXiv:2408.15664, which moves the bias
        by a constant in the direction of the error's sign.
    """
    num_experts = len(bias)
    counts = one_hot(selected_experts.flatten(), num_experts).sum(0).to(bias.dtype)
    excess = counts / max(1, selected_experts.numel()) - 1 / num_experts
    value = _BIAS_GRADIENT * (bias * excess).sum()
    return value - value.detach()


def router_z_loss(router_logits: Float[Tensor, "T E"]) -> Float[Tensor, ""]:
    """Compute the mean of `logsumexp(logits)²`.

    Source: Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5.
    """
    return router_logits.logsumexp(-1).square().sum() / max(1, len(router_logits))


def router_loss(
    routing: Sequence[LayerRouting],
    *,
    aux_loss_coef: float,
    z_loss_coef: float,
    scope: Literal["pooled", "per_layer"],
) -> Float[Tensor, ""]:
    """Add up an adapter's router losses with their coefficients.

    Args:
        routing: The record of one forward, an entry for each router.
        aux_loss_coef: Of the load-balance loss.
        z_loss_coef: Of the z-loss.
        scope: Pool the load over all routers, or average a loss for each. Routers with different
            numbers of experts can't be pooled.
    """
    if scope == "pooled":
        logits = torch.cat([layer.router_logits for layer in routing])
        selected = torch.cat([layer.selected_experts for layer in routing])
        balance = load_balance_loss(logits, selected, torch.cat([_is_used(r) for r in routing]))
    else:
        per_router = [
            load_balance_loss(r.router_logits, r.selected_experts, _is_used(r)) for r in routing
        ]
        balance = torch.stack(per_router).mean()
    loss = aux_loss_coef * balance
    if z_loss_coef > 0:
        z_loss = torch.stack([router_z_loss(layer.router_logits) for layer in routing]).mean()
        loss = loss + z_loss_coef * z_loss
    return loss


def _is_used(routing: LayerRouting) -> Tensor:
    """Tell which of a token's experts have weight, [T, K]."""
    return routing.routing_weights.detach() > 0
