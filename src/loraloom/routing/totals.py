"""Routing added up over many forwards, in memory that does not grow with the tokens.

Axes: N routers, T tokens, E experts (the most that a router has; zeros follow where it has fewer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.routing.record import LayerRouting, RouterName
from loraloom.routing.statistics import expert_loads, load_shares


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the real tokens of one adapter; totals of the same routers can be added.

    Args:
        routers: Each router's layer and projection.
        num_experts: Of each router.
        num_tokens: T; each chooses its experts in every layer.
        tokens_per_expert: How often each expert was chosen, [N, E] float64; see `expert_loads`.
        probabilities: The router's probabilities, summed over tokens, [N, E] float64.
        token_entropies_bits: The entropy of each token's probabilities, summed, [N] float64.
    """

    routers: tuple[RouterName, ...]
    num_experts: tuple[int, ...]
    num_tokens: int
    tokens_per_expert: Tensor
    probabilities: Tensor
    token_entropies_bits: Tensor

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        return RoutingTotals(
            self.routers,
            self.num_experts,
            self.num_tokens + other.num_tokens,
            self.tokens_per_expert + other.tokens_per_expert,
            self.probabilities + other.probabilities,
            self.token_entropies_bits + other.token_entropies_bits,
        )

    @property
    def load(self) -> Tensor:
        """Each expert's share of a router's load, [N, E]."""
        return load_shares(self.tokens_per_expert)

    @property
    def effective_experts(self) -> Tensor:
        """The number of experts that the load is spread over, [N]; see `effective_number`."""
        return effective_number(self.load)

    @property
    def mean_entropy_bits(self) -> Tensor:
        """Entropy of the router's probabilities, averaged over tokens before: is a layer mixed?"""
        return entropy_bits(load_shares(self.probabilities))

    @property
    def token_entropy_bits(self) -> Tensor:
        """Entropy of each token's probabilities, averaged after: are tokens undecided?"""
        return self.token_entropies_bits / max(1, self.num_tokens)


def routing_totals(routing: Sequence[LayerRouting]) -> RoutingTotals:
    """Sum up one forward's record, on the CPU."""
    loads = expert_loads(routing).cpu()
    sums = torch.zeros_like(loads)
    entropies = sums.new_zeros(len(routing))
    for index, record in enumerate(routing):
        log_probabilities = record.router_logits.detach().log_softmax(-1)  # (T, E)
        probabilities = log_probabilities.exp()
        sums[index, : record.num_experts] = probabilities.sum(0)
        entropies[index] = -(probabilities * log_probabilities).sum() / math.log(2)
    return RoutingTotals(
        routers=tuple(record.router for record in routing),
        num_experts=tuple(record.num_experts for record in routing),
        num_tokens=len(routing[0].router_logits),
        tokens_per_expert=loads,
        probabilities=sums,
        token_entropies_bits=entropies,
    )


def entropy_bits(shares: Tensor) -> Tensor:
    """Compute `-Σ_e p_e log2 p_e` over the last axis; 0 where all are zero."""
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(2)


def effective_number(shares: Tensor) -> Tensor:
    """Compute `exp(-Σ_e p_e ln p_e)`: E when all have the same share, 1 when one has all.

    Source:
        Hill 1973, Diversity and evenness, Ecology 54 (the number of order 1).
    """
    return torch.exp2(entropy_bits(shares))


def load_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compute `1 - sqrt(JSD(p, q))`, JSD in bits: 1 for the same load, 0 for no expert in common.

    Source:
        Endres & Schindelin 2003, A new metric for probability distributions.
    """
    middle = entropy_bits((first + second) / 2)
    divergence = middle - (entropy_bits(first) + entropy_bits(second)) / 2
    return 1 - divergence.clamp(0, 1).sqrt()
