"""How a router spreads its load: the signals of a collapse.

Axes: N layers, T tokens, E experts, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.routing.record import LayerRouting


@dataclass(frozen=True)
class RouterStatistics:
    """Load and certainty of an adapter's routers over some tokens.

    Args:
        tokens_per_expert: How often each expert was chosen, [N, E] int64.
        entropy: Mean over layers and tokens of the entropy of the router's probabilities, divided
            by ln E: 1 is uniform, 0 is certain.
        load_cv: Standard deviation of the load over experts divided by its mean, averaged over
            layers: 0 is balanced, sqrt(E - 1) is one expert for all.
    """

    tokens_per_expert: Tensor
    entropy: float
    load_cv: float


def load_statistics(routing: Sequence[LayerRouting]) -> RouterStatistics:
    """Compute the statistics of one forward's record; layers without tokens count as balanced."""
    counts = count_choices(routing)
    load = counts.double()
    mean = load.mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    load_cv = (load.std(-1, correction=0) / mean).mean()
    entropies = [_entropy(layer.router_logits.detach()) for layer in routing]
    return RouterStatistics(counts, sum(entropies) / len(entropies), float(load_cv))


def count_choices(routing: Sequence[LayerRouting]) -> Tensor:
    """Count how often each expert was chosen in each layer, [N, E] int64."""
    num_experts = routing[0].router_logits.shape[-1]
    chosen = [
        layer.selected_experts.flatten() + index * num_experts
        for index, layer in enumerate(routing)
    ]
    counts = torch.bincount(torch.cat(chosen), minlength=len(routing) * num_experts)
    return counts.view(len(routing), num_experts)


def load_shares(counts: Tensor) -> Tensor:
    """Divide counts [..., E] by their sum; a row of zeros stays zero."""
    total = counts.sum(-1, keepdim=True)
    return counts.double() / total.where(total > 0, 1)


def _entropy(router_logits: Tensor) -> float:
    num_tokens, num_experts = router_logits.shape
    if num_experts == 1 or num_tokens == 0:
        return 1.0
    log_probabilities = router_logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    return float(entropy) / math.log(num_experts)
