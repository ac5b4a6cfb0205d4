"""When a mixture is none any more: experts without tokens, layers that use the same few for all.

Axes: N layers, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraloom.config.adapter import MixLoraConfig
from loraloom.routing.statistics import load_shares
from loraloom.routing.totals import effective_number

UNUSED_SHARE = 0.01
"""An expert below this part of its fair share, 1 / E, is unused: at 8 experts 1 choice in 800."""

UNUSED_PART = 0.05
"""Part of all layers' experts that must be unused for a warning. Single ones are common where the
balance loss pools layers: 3 of 240 after 50 steps of a healthy run."""

COLLAPSED_PART = 0.1
"""A layer is collapsed if its effective number of experts is at most this part of the way from
top_k, where all tokens choose the same experts, to E, where the load is balanced."""

MIN_CHOICES_PER_EXPERT = 500
"""With fewer choices a layer is not judged: an unused expert has five of them at most."""

_MAX_NAMED = 4


def has_enough_choices(tokens_per_expert: Tensor) -> bool:
    """Whether every layer has choices enough to be judged, [N, E]."""
    num_experts = tokens_per_expert.shape[-1]
    return int(tokens_per_expert.sum(-1).min()) >= MIN_CHOICES_PER_EXPERT * num_experts


def find_collapse(
    layers: Sequence[int], tokens_per_expert: Tensor, config: MixLoraConfig
) -> dict[str, str]:
    """Describe what has collapsed, by kind: `unused experts`, `collapsed layers`.

    Args:
        layers: Index of each layer.
        tokens_per_expert: How often each expert was chosen, [N, E].
        config: Of the mixture.

    Returns:
        A text for each kind that is there; nothing where a token takes all experts anyway.
    """
    num_experts, top_k = config.num_experts, config.top_k
    if num_experts == top_k or not has_enough_choices(tokens_per_expert):
        return {}
    load = load_shares(tokens_per_expert)
    unused = load < UNUSED_SHARE / num_experts
    least = top_k + COLLAPSED_PART * (num_experts - top_k)
    collapsed = {
        layer: f"{number:.1f}"
        for layer, number in zip(layers, effective_number(load).tolist(), strict=True)
        if number <= least
    }
    found = {}
    num_unused = int(unused.sum())
    if num_unused >= UNUSED_PART * unused.numel():
        limit = 100 * UNUSED_SHARE / num_experts
        found["unused experts"] = (
            f"{num_unused} of {unused.numel()} experts are hardly used (below {limit:.2g} % of "
            f"choices, {100 / num_experts:.3g} % would be even): "
            f"{_name_layers(_name_experts(layers, unused))}"
        )
    if collapsed:
        found["collapsed layers"] = (
            f"layers that send nearly all tokens to the same experts (effective number at most "
            f"{least:.1f} of {num_experts}, top_k is {top_k}): {_name_layers(collapsed)}"
        )
    return found


def advice(config: MixLoraConfig) -> str:
    """Say what to change before training again."""
    scope = "" if config.router_loss_scope == "per_layer" else ", set router_loss_scope: per_layer"
    return (
        f"raise router_aux_loss_coef (it is {config.router_aux_loss_coef:g}){scope}, or lower "
        "learning_rate"
    )


def _name_experts(layers: Sequence[int], unused: Tensor) -> dict[int, str]:
    """Name each layer's unused experts."""
    return {
        layer: f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
        for layer, row in zip(layers, unused, strict=True)
        if (experts := torch.nonzero(row).squeeze(1).tolist())
    }


def _name_layers(by_layer: Mapping[int, str]) -> str:
    named = [f"layer {layer} ({text})" for layer, text in list(by_layer.items())[:_MAX_NAMED]]
    rest = len(by_layer) - len(named)
    return ", ".join([*named, *([f"{rest} more layers"] if rest else [])])
