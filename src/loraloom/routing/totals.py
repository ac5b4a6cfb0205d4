"""Routing added up over many forwards, in memory that does not grow with the tokens.

Axes: N layers, T tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.routing.record import LayerRouting
from loraloom.routing.statistics import count_choices, load_shares


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the real tokens of one adapter; totals of the same layers can be added.

    Args:
        layers: Index of each decoder layer that has a router.
        num_tokens: T; each chooses its experts in every layer.
        tokens_per_expert: How often each expert was chosen, [N, E] int64.
        probabilities: The router's probabilities, summed over tokens, [N, E] float64.
        token_entropies_bits: The entropy of each token's probabilities, summed, [N] float64.
    """

    layers: tuple[int, ...]
    num_tokens: int
    tokens_per_expert: Tensor
    probabilities: Tensor
    token_entropies_bits: Tensor

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        return RoutingTotals(
            self.layers,
            self.num_tokens + other.num_tokens,
            self.tokens_per_expert + other.tokens_per_expert,
            self.probabilities + other.probabilities,
            self.token_entropies_bits + other.token_entropies_bits,
        )

    @property
    def load(self) -> Tensor:
        """Each expert's share of a layer's choices, [N, E]."""
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
    """Sum up one forward's record, on the CPU.

    Args:
        routing: At least one layer; all have the same tokens and numbers of experts.
    """
    logits = torch.stack([layer.router_logits.detach() for layer in routing])  # (N, T, E)
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    entropies = -(probabilities * log_probabilities).sum((-1, -2)) / math.log(2)
    return RoutingTotals(
        layers=tuple(layer.layer for layer in routing),
        num_tokens=logits.shape[1],
        tokens_per_expert=count_choices(routing).cpu(),
        probabilities=probabilities.sum(1).cpu().double(),
        token_entropies_bits=entropies.cpu().double(),
    )


def entropy_bits(shares: Tensor) -> Tensor:
    """Compute `-Σ_e p_e log2 p_e` over the last axis; 0 where all are zero."""
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(2)


def effective_number(shares: Tensor) -> Tensor:
    """Compute `exp(-Σ_e p_e ln p_e)`: E when all have the same share, 1 when one has all.

    Args:
        shares: Non-negative, [..., E]; each row sums to 1, or is zero and gives 1.

    Source:
        Hill 1973, Diversity and evenness, Ecology 54 (the number of order 1).
    """
    return torch.exp2(entropy_bits(shares))


def load_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compute `1 - sqrt(JSD(p, q))`, JSD in bits: 1 for the same load, 0 for no expert in common.

    Args:
        first: Loads, [..., E]; each row sums to 1.
        second: Others.

    Returns:
        In [0, 1], [...].

    Source:
        Endres & Schindelin 2003, A new metric for probability distributions.
    """
    middle = entropy_bits((first + second) / 2)
    divergence = middle - (entropy_bits(first) + entropy_bits(second)) / 2
    return 1 - divergence.clamp(0, 1).sqrt()
