"""Where tokens went: the one count of it, for training, evaluation and serving.

Axes: C classes of tokens (a task or skill, say), N routers, T tokens, K top_k, E experts (the most
that a router has; zeros follow where it has fewer). Memory does not grow with the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraloom.devices import has_float64
from loraloom.errors import names_in
from loraloom.routing.record import LayerRouting, RouterName, describe_router

# An expert below this part of its fair share, 1 / E, is unused: at 8 experts 1 choice in 320.
UNUSED_SHARE = 0.025

# Part of all layers' experts that must be unused for a warning, if no layer uses top_k alone.
# Single ones are common where the balance loss pools layers: in a healthy run of 50 steps 3 of 240
# experts had less than 1 % of their share.
UNUSED_PART = 0.05

# With fewer choices a layer is not judged: an unused expert has twelve of them at most.
MIN_CHOICES_PER_EXPERT = 500

_MAX_NAMED = 4

# How often each router chose each of its experts.
Choices = Mapping[RouterName, Sequence[int]]


def widened(values: Tensor) -> Tensor:
    """Values in float64, on the CPU where their device has none."""
    if not has_float64(values.device):
        values = values.cpu()
    return values.double()


def sum_extra(routing: Sequence[LayerRouting]) -> dict[str, Float[Tensor, ""]]:
    """Add up over tokens what methods record of their own, by name; means over routers."""
    sums: dict[str, list[Tensor]] = {}
    for record in routing:
        for name, values in record.extra.items():
            numbers_per_token = values.shape[1:].numel()  # ty: ignore[missing-attribute]
            total = widened(values.detach()).sum() / numbers_per_token
            sums.setdefault(name, []).append(total)
    return {name: torch.stack(totals).mean() for name, totals in sums.items()}


@dataclass(frozen=True)
class RoutingTotals:
    """Sums over the real tokens of one adapter; totals of the same routers can be added."""

    # `sums` has by router the tokens, the sum of the entropies of their probabilities in bits,
    # the experts' loads, and the probabilities' sum, [N, 2 + 2·E], where `widened` is until read.

    routers: tuple[RouterName, ...]
    num_experts: tuple[int, ...]  # of each router
    sums: Tensor

    @staticmethod
    def of(routing: Sequence[LayerRouting]) -> RoutingTotals:
        """Sum up one forward's record."""
        first = routing[0].selected_experts
        all_alike = first.new_zeros(len(first))
        loads = loads_by_class(routing, all_alike, num_classes=1)[0]
        sums = torch.zeros_like(loads)
        tokens_and_bits = loads.new_zeros(len(routing), 2)
        for index, record in enumerate(routing):
            probabilities = record.router_logits.detach().softmax(-1)  # (T, E)
            # Widened once experts are summed up: over many tokens float32 would lose digits.
            entropies = widened(torch.special.entr(probabilities).sum(-1))
            tokens_and_bits[index, :1] = len(probabilities)  # an index would make a device wait
            tokens_and_bits[index, 1] = entropies.sum() / math.log(2)
            sums[index, : record.num_experts] = probabilities.sum(0)
        return RoutingTotals(
            routers=tuple(record.router for record in routing),
            num_experts=tuple(record.num_experts for record in routing),
            sums=torch.cat([tokens_and_bits, loads, sums], dim=1),
        )

    def __add__(self, more: RoutingTotals) -> RoutingTotals:
        return replace(self, sums=self.sums + more.sums)

    @property
    def num_tokens(self) -> int:
        """T; each chooses its experts in every layer."""
        return int(self.sums[0, 0])

    @property
    def tokens_per_expert(self) -> list[list[float]]:
        loads, _ = self.sums[:, 2:].chunk(2, dim=1)
        counts = []
        for row, num_experts in zip(loads.tolist(), self.num_experts, strict=True):
            counts.append(row[:num_experts])
        return counts

    @property
    def choices(self) -> dict[RouterName, list[int]]:
        choices = {}
        for router, counts in zip(self.routers, self.tokens_per_expert, strict=True):
            choices[router] = [round(count) if math.isfinite(count) else 0 for count in counts]
        return choices

    @property
    def load(self) -> Tensor:
        """Each expert's share of a router's load, [N, E]: over how many is it spread?"""
        loads, _ = self.sums[:, 2:].chunk(2, dim=1)
        return load_shares(loads)

    @property
    def load_cv(self) -> float:
        """Deviation of the load over its mean: 0 if balanced, at most sqrt(E - 1)."""
        spreads = []
        for load in self.tokens_per_expert:
            mean = fmean(load)
            variance = fmean((count - mean) ** 2 for count in load)
            spreads.append(math.sqrt(variance) / mean if mean else 0.0)
        return fmean(spreads)

    @property
    def mean_probabilities(self) -> Tensor:
        """The router's probabilities, averaged over tokens, [N, E]: is a layer mixed?"""
        _, probabilities = self.sums[:, 2:].chunk(2, dim=1)
        return load_shares(probabilities)

    @property
    def token_entropy_bits(self) -> Tensor:
        """Entropy of each token's probabilities, averaged after: are tokens undecided?"""
        num_tokens = self.sums[:, 0].clamp_min(1)
        return self.sums[:, 1] / num_tokens

    @property
    def entropy(self) -> float:
        """The same in parts of ln E, averaged over routers: 1 is uniform, 0 is certain."""
        if self.num_tokens == 0:
            return 1.0
        entropies = []
        for bits, size in zip(self.token_entropy_bits.tolist(), self.num_experts, strict=True):
            entropies.append(bits / math.log2(size) if size > 1 else 1.0)
        return fmean(entropies)


def loads_by_class(
    routing: Sequence[LayerRouting], classes: Int[Tensor, " T"], num_classes: int
) -> Float[Tensor, "C N E"]:
    """How often each class's tokens chose each expert; its weights' sum where tokens take all."""
    num_routers = len(routing)
    num_experts = max(record.num_experts for record in routing)
    first_rows = classes.unsqueeze(1) * num_routers
    indices = []  # of each choice in the flat loads
    shares = []
    for number, record in enumerate(routing):
        first_indices = (first_rows + number) * num_experts
        indices.append((first_indices + record.selected_experts).flatten())
        shares.append(record.shares.flatten())
    summands = widened(torch.cat(shares))
    loads = summands.new_zeros(num_classes * num_routers * num_experts)
    # bincount would read the largest first
    loads.scatter_add_(0, torch.cat(indices).to(summands.device), summands)
    return loads.view(num_classes, num_routers, num_experts)


def load_shares(counts: Tensor) -> Tensor:
    """Divide counts [..., E] by their sum; a row of zeros stays zero."""
    total = counts.sum(-1, keepdim=True)
    return counts.double() / total.where(total > 0, 1)


def entropy_bits(shares: Tensor) -> Tensor:
    """Compute `-Σ_e p_e log2 p_e` over the last axis; 0 where all are zero."""
    return torch.special.entr(shares).sum(-1) / math.log(2)


def effective_number(shares: Tensor) -> Tensor:
    """`exp(-Σ_e p_e ln p_e)`, from 1 to E (Hill 1973, Diversity and evenness, Ecology 54)."""
    return torch.exp2(entropy_bits(shares))


def specialisation_bits(loads: Float[Tensor, "C N E"]) -> Float[Tensor, "C N"]:
    """KL(p(e | c) ‖ p(e)) in bits, from 0 for a class that goes where all go to log2(1 / p(c))."""
    class_shares = load_shares(loads)
    shares = load_shares(loads.sum(0))
    logs = torch.special.xlogy(class_shares, class_shares)
    logs -= torch.special.xlogy(class_shares, shares)
    bits = logs.sum(-1) / math.log(2)
    return bits.clamp_min(0)


def mutual_information_bits(loads: Float[Tensor, "C N E"]) -> Float[Tensor, " N"]:
    """I(expert; class) = Σ_c p(c) KL(p(e | c) ‖ p(e)) in bits; 0 where classes go alike."""
    class_probabilities = load_shares(loads.sum(-1).T).T  # (C, N)
    return (class_probabilities * specialisation_bits(loads)).sum(0)


def has_enough_choices(choices: Choices) -> bool:
    return all(sum(counts) >= MIN_CHOICES_PER_EXPERT * len(counts) for counts in choices.values())


def find_collapse(choices: Choices, top_k: int) -> str | None:
    """Describe how a mixture is none any more: tokens leave some experts unused."""
    choices = {router: counts for router, counts in choices.items() if len(counts) > top_k}
    if not choices or not has_enough_choices(choices):
        return None
    num_experts = 0
    num_unused = 0
    has_collapsed = False  # a router, whose tokens all choose the same experts
    unused: list[str] = []
    for router, counts in choices.items():
        fewest = UNUSED_SHARE * sum(counts) / len(counts)
        experts = [str(expert) for expert, count in enumerate(counts) if count < fewest]
        num_experts += len(counts)
        num_unused += len(experts)
        has_collapsed |= len(counts) - len(experts) <= top_k
        if experts:
            plural = "s" if len(experts) > 1 else ""
            unused.append(f"{describe_router(router)} (expert{plural} {', '.join(experts)})")
    if num_unused < UNUSED_PART * num_experts and not has_collapsed:
        return None
    return (
        f"{num_unused} of {num_experts} experts are almost unused "
        f"(below {100 * UNUSED_SHARE:g} % of an even share): {names_in(unused, _MAX_NAMED)}"
    )
