"""Where tokens went: the one count of it, for training, evaluation and serving.

`measure_load` sums up a training step; `RoutingTotals` add up over many forwards, in memory that
does not grow with the tokens; loads by class tell how much the choice of an expert says about the
class of a token: the task or skill that it belongs to, or whether it begins a word.

Axes: C classes, N routers, T tokens, K top_k, E experts (the most that a router has; zeros follow
where it has fewer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Float, Int
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


def loads_by_class(
    routing: Sequence[LayerRouting], classes: Int[Tensor, " T"], num_classes: int
) -> Float[Tensor, "C N E"]:
    """Add up each expert's load at each router over the tokens of each class, on the CPU."""
    num_experts = max(record.num_experts for record in routing)
    loads = torch.zeros(len(routing), num_classes * num_experts, dtype=torch.float64)
    for load, record in zip(loads, routing, strict=True):
        places = classes.unsqueeze(1) * num_experts + record.selected_experts.cpu()  # (T, K)
        load.scatter_add_(0, places.flatten(), record.shares.flatten().double().cpu())
    return loads.view(len(routing), num_classes, num_experts).transpose(0, 1)


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


def specialisation_bits(loads: Float[Tensor, "C N E"]) -> Float[Tensor, "C N"]:
    """Compute KL(p(e | c) ‖ p(e)) in bits: how far a class's load is from that of all tokens.

    It is 0 for a class whose tokens go where all tokens go, and at most log2(1 / p(c)).
    """
    of_class, of_all = load_shares(loads), load_shares(loads.sum(0))
    logs = torch.special.xlogy(of_class, of_class) - torch.special.xlogy(of_class, of_all)
    return (logs.sum(-1) / math.log(2)).clamp_min(0)


def mutual_information_bits(loads: Float[Tensor, "C N E"]) -> Float[Tensor, " N"]:
    """Compute I(expert; class) = Σ_c p(c) KL(p(e | c) ‖ p(e)) in bits, at each router.

    It is 0 where experts take tokens of all classes alike, and at most the entropy of the classes
    or of the experts, the smaller of the two.
    """
    return (load_shares(loads.sum(-1).T).T * specialisation_bits(loads)).sum(0)
