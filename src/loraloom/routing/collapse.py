"""When a mixture is none any more: experts without tokens, layers that use the same few for all.

Axes: E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraloom.routing.record import RouterName, describe_router
from loraloom.routing.tally import effective_number, load_shares

# An expert below this part of its fair share, 1 / E, is unused: at 8 experts 1 choice in 800.
UNUSED_SHARE = 0.01

# Part of all layers' experts that must be unused for a warning. Single ones are common where the
# balance loss pools layers: 3 of 240 after 50 steps of a healthy run.
UNUSED_PART = 0.05

# A layer is collapsed if its effective number of experts is at most this part of the way from
# top_k, where all tokens choose the same experts, to E, where the load is balanced.
COLLAPSED_PART = 0.1

# With fewer choices a layer is not judged: an unused expert has five of them at most.
MIN_CHOICES_PER_EXPERT = 500

_MAX_NAMED = 4


# How often each router chose each of its experts.
Choices = Mapping[RouterName, Sequence[int]]


def has_enough_choices(choices: Choices) -> bool:
    """Whether every router has choices enough to be judged."""
    return all(sum(counts) >= MIN_CHOICES_PER_EXPERT * len(counts) for counts in choices.values())


# What to change where routers have collapsed.
COLLAPSE_ADVICE = (
    "raise router_aux_loss_coef, set router_loss_scope: per_layer, or lower learning_rate"
)


def find_collapse(choices: Choices, top_k: int) -> dict[str, str]:
    """Describe what has collapsed, by kind: `unused experts`, `collapsed layers`."""
    choices = {router: counts for router, counts in choices.items() if len(counts) > top_k}
    if not choices or not has_enough_choices(choices):
        return {}
    loads = {router: load_shares(torch.tensor(counts)) for router, counts in choices.items()}
    most = max(map(len, choices.values()))
    found = {}
    unused = {router: own for router, load in loads.items() if (own := _unused(load))}
    num_unused, num_experts = sum(map(len, unused.values())), sum(map(len, choices.values()))
    if num_unused >= UNUSED_PART * num_experts:
        found["unused experts"] = (
            f"{num_unused} of {num_experts} experts are hardly used (below "
            f"{100 * UNUSED_SHARE / most:.2g} % of choices, {100 / most:.3g} % would be even): "
            f"{_name_routers({router: _name_experts(own) for router, own in unused.items()})}"
        )
    numbers = {router: float(effective_number(load)) for router, load in loads.items()}
    collapsed = {
        router: f"{number:.1f}"
        for router, number in numbers.items()
        if number <= _least_effective(len(choices[router]), top_k)
    }
    if collapsed:
        found["collapsed layers"] = (
            f"layers that send nearly all tokens to the same experts (effective number at most "
            f"{_least_effective(most, top_k):.1f} of {most}, top_k is {top_k}): "
            f"{_name_routers(collapsed)}"
        )
    return found


def _unused(load: Tensor) -> list[int]:
    return torch.nonzero(load < UNUSED_SHARE / len(load)).squeeze(1).tolist()


def _least_effective(num_experts: int, top_k: int) -> float:
    return top_k + COLLAPSED_PART * (num_experts - top_k)


def _name_experts(experts: Sequence[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"


def _name_routers(texts: Mapping[RouterName, str]) -> str:
    named = [f"{describe_router(router)} ({text})" for router, text in texts.items()]
    rest = len(named) - _MAX_NAMED
    return ", ".join([*named[:_MAX_NAMED], *([f"{rest} more layers"] if rest > 0 else [])])
