"""How a router spreads its load: the signals of a collapse.

Axes: N routers, T tokens, E experts, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from loraloom.routing.record import LayerRouting, RouterName


@dataclass(frozen=True)
class RouterStatistics:
    """Load and certainty of an adapter's routers over some tokens.

    Args:
        tokens_per_expert: How often each router chose each of its experts; see `expert_loads`.
        entropy: Mean over routers and tokens of the entropy of the router's probabilities, divided
            by ln E: 1 is uniform, 0 is certain.
        load_cv: Standard deviation of the load over experts divided by its mean, averaged over
            routers: 0 is balanced, sqrt(E - 1) is one expert for all.
    """

    tokens_per_expert: dict[RouterName, list[int]]
    entropy: float
    load_cv: float


def measure_load(routing: Sequence[LayerRouting]) -> Tensor:
    """Compute what `read_statistics` reads, on the routers' device, [2 + N·E] float64.

    What several parts of a batch give can be added up.
    """
    entropies = [_entropies(record.router_logits.detach()).double().sum() for record in routing]
    num_tokens = sum(len(record.router_logits) for record in routing)
    sums = torch.stack(entropies).sum()
    return torch.cat(
        [torch.stack([sums, sums.new_full((), num_tokens)]), expert_loads(routing).flatten()]
    )


def read_statistics(routing: Sequence[LayerRouting], measured: Sequence[float]) -> RouterStatistics:
    """Make statistics of the numbers that `measure_load` computed for a record."""
    entropy, num_tokens, *counts = measured
    widest = len(counts) // len(routing)
    loads = [
        counts[start : start + record.num_experts]
        for record, start in zip(routing, range(0, len(counts), widest), strict=True)
    ]
    return RouterStatistics(
        {
            record.router: [round(count) if math.isfinite(count) else 0 for count in load]
            for record, load in zip(routing, loads, strict=True)
        },
        entropy / num_tokens if num_tokens else 1.0,
        fmean(map(_spread, loads)),
    )


def expert_loads(routing: Sequence[LayerRouting]) -> Tensor:
    """Add up each expert's load at each router, [N, E] float64: how often it was chosen.

    Where tokens take all experts, it is the sum of their weights. E is the most experts that any
    router has; where one has fewer, zeros follow.
    """
    num_experts = max(record.num_experts for record in routing)
    chosen = [
        record.selected_experts.flatten() + index * num_experts
        for index, record in enumerate(routing)
    ]
    places = torch.cat(chosen)
    shares = torch.cat([record.shares.flatten().double() for record in routing])
    loads = shares.new_zeros(len(routing) * num_experts)  # bincount reads the largest first
    loads.scatter_add_(0, places, shares)
    return loads.view(len(routing), num_experts)


def load_shares(counts: Tensor) -> Tensor:
    """Divide counts [..., E] by their sum; a row of zeros stays zero."""
    total = counts.sum(-1, keepdim=True)
    return counts.double() / total.where(total > 0, 1)


def _spread(load: Sequence[float]) -> float:
    """Divide the standard deviation of a load over experts by its mean; 0 without any load."""
    mean = fmean(load)
    return math.sqrt(fmean((count - mean) ** 2 for count in load)) / mean if mean else 0.0


def _entropies(router_logits: Tensor) -> Tensor:
    """Compute the entropy of each token's probabilities, divided by ln E, [T]."""
    num_tokens, num_experts = router_logits.shape
    if num_experts == 1:
        return router_logits.new_ones(num_tokens)
    log_probabilities = router_logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1) / math.log(num_experts)
