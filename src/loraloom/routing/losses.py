"""Losses on the router, over the real tokens of one micro-batch.

Axes: T tokens (of all layers where pooled), E experts, K top_k.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loraloom.routing.record import LayerRouting

# Adds a tensor up over everybody who has a part of the micro-batch.
AddUp = Callable[[Tensor], Tensor]


def keep(tensor: Tensor) -> Tensor:
    """Add up over the one who has all of it."""
    return tensor.detach()


def router_loss(
    routing: Sequence[LayerRouting],
    aux_loss_coef: float,
    z_loss_coef: float,
    scope: Literal["pooled", "per_layer"],
    add_up: AddUp,
) -> Float[Tensor, ""]:
    """Add up an adapter's router losses with their coefficients.

    The load-balance loss is `E · Σ_j Σ_n f[j, n] · P[n]`: f[j, n] is the share of tokens whose slot
    j went to expert n (no gradient), P[n] the mean probability of n by the raw logits, without a
    route's temperature. The loss is K when balanced; K is the mean number of experts that a
    token uses, where it differs. The z-loss is the mean of `logsumexp(logits)²`.
    Where several have a part of the micro-batch each, shares and numbers of tokens are everybody's,
    probabilities one's own.

    Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, eq. 4-6, summed over slots as
    in MoE-PEFT 2.0.2 (`MixtralRouterLoss`); Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5.
    """
    widest = max(record.num_experts for record in routing)
    counts = add_up(torch.stack([_counts(record, widest) for record in routing]))
    if scope == "pooled":
        logits = torch.cat([record.router_logits for record in routing])
        balance = _balance(logits, counts.sum(0))
    else:
        balances = [
            _balance(record.router_logits, layer_counts)
            for record, layer_counts in zip(routing, counts, strict=True)
        ]
        balance = torch.stack(balances).mean()
    loss = aux_loss_coef * balance
    if z_loss_coef > 0:
        logsumexps = [record.router_logits.logsumexp(-1) for record in routing]
        squares = torch.stack([values.square().sum() for values in logsumexps])
        num_tokens = counts[:, -1].clamp_min(1)
        z_losses = squares / num_tokens
        loss = loss + z_loss_coef * z_losses.mean()
    return loss


def _counts(record: LayerRouting, num_experts: int) -> Tensor:
    """Count how often each expert had weight in any slot, and behind them the tokens, [E + 1]."""
    has_weight = record.routing_weights.detach() > 0
    counts = record.router_logits.new_zeros(num_experts + 1)
    summands = has_weight.flatten().to(counts.dtype)
    counts.scatter_add_(0, record.selected_experts.flatten(), summands)
    counts[-1:] = len(record.selected_experts)  # an index would make a device wait
    return counts


def _balance(router_logits: Tensor, counts: Tensor) -> Tensor:
    """Compute the loss of tokens among those that were counted."""
    num_experts = router_logits.shape[-1]
    num_tokens = counts[-1].clamp_min(1)  # no tokens cost nothing
    probability = router_logits.softmax(-1).sum(0)
    products = counts[:num_experts] * probability
    return num_experts * products.sum() / num_tokens**2
