"""How a router spreads its load: the signals of a collapse.

Axes: N routers, T tokens, E experts, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def load_statistics(routing: Sequence[LayerRouting]) -> RouterStatistics:
    """Compute the statistics of one forward's record; routers without tokens count as balanced."""
    return read_statistics(routing, measure_load(routing).tolist())


def measure_load(routing: Sequence[LayerRouting]) -> Tensor:
    """Compute what `read_statistics` reads, on the routers' device, [2 + N·E] float64."""
    load = expert_loads(routing)
    num_experts = torch.tensor([record.num_experts for record in routing]).to(load)
    mean = load.sum(-1) / num_experts
    spread = (load.square().sum(-1) / num_experts - mean.square()).clamp_min(0).sqrt()
    entropies = [_entropy(record.router_logits.detach()).double() for record in routing]
    means = torch.stack(
        [torch.stack(entropies).mean(), (spread / mean.clamp_min(1 / num_experts)).mean()]
    )
    return torch.cat([means, load.flatten()])


def read_statistics(routing: Sequence[LayerRouting], measured: Sequence[float]) -> RouterStatistics:
    """Name the numbers that `measure_load` computed for a record."""
    entropy, load_cv, *counts = measured
    widest = len(counts) // len(routing)
    return RouterStatistics(
        {
            record.router: [round(count) for count in counts[start : start + record.num_experts]]
            for record, start in zip(routing, range(0, len(counts), widest), strict=True)
        },
        entropy,
        load_cv,
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


def _entropy(router_logits: Tensor) -> Tensor:
    num_tokens, num_experts = router_logits.shape
    if num_experts == 1 or num_tokens == 0:
        return router_logits.new_ones(())
    log_probabilities = router_logits.log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).mean()
    return entropy / math.log(num_experts)
