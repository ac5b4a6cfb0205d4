"""What a router reports of a running forward.

Axes: T real tokens, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# A layer, and a projection (None for a router of the whole FFN block).
RouterName = tuple[int, str | None]


def describe_router(router: RouterName) -> str:
    """Name a router for people: `layer 3`, or `layer 3 self_attn.q_proj`."""
    layer, projection = router
    return f"layer {layer}" if projection is None else f"layer {layer} {projection}"


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one adapter's real tokens by one router; padding is left out."""

    layer: int
    router_logits: Tensor  # raw, [T, E] float32, with gradient in training
    selected_experts: Tensor  # best first, [T, K]
    routing_weights: Tensor  # [T, K] float32
    projection: str | None = None  # as `self_attn.q_proj`; None for an FFN block's router
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # what else a method says, [T, …]

    @property
    def num_experts(self) -> int:
        return self.router_logits.shape[-1]

    @property
    def shares(self) -> Tensor:
        """What each choice counts for in its expert's load: 1 where tokens choose a fixed few."""
        # Where a token may take all experts they are its weights, as choices would all be alike.
        if self.selected_experts.shape[1] < self.num_experts:
            return torch.ones_like(self.routing_weights)
        return self.routing_weights.detach()

    def emptied(self) -> LayerRouting:
        return with_tensors([self], lambda tensors: tensors[0][:0])

    @property
    def router(self) -> RouterName:
        return self.layer, self.projection


@dataclass(frozen=True)
class RouterChoice:
    """What a router did with one token."""

    router: RouterName
    num_experts: int
    experts: list[int]  # best first
    weights: list[float]


def choices_by_token(routing: Sequence[LayerRouting]) -> list[list[RouterChoice]]:
    """Turn the records of routers that saw the same tokens into what each token met."""
    by_router = []
    for record in routing:
        experts_by_token = record.selected_experts.tolist()
        weights_by_token = record.routing_weights.tolist()
        choices = []
        for experts, weights in zip(experts_by_token, weights_by_token, strict=True):
            choices.append(RouterChoice(record.router, record.num_experts, experts, weights))
        by_router.append(choices)
    return [list(choices) for choices in zip(*by_router, strict=True)]


def join_routing(records: Iterable[LayerRouting]) -> list[LayerRouting]:
    """Put what each router did in several segments of a batch together."""
    by_router: dict[RouterName, list[LayerRouting]] = {}
    for record in records:
        by_router.setdefault(record.router, []).append(record)
    return [
        segments[0] if len(segments) == 1 else with_tensors(segments, torch.cat)
        for segments in by_router.values()
    ]


def with_tensors(
    records: Sequence[LayerRouting], change: Callable[[list[Tensor]], Tensor]
) -> LayerRouting:
    """Make one record of a router's, by a function of the tensors that they have in each field."""
    extra = {}
    for name in records[0].extra:
        extra[name] = change([record.extra[name] for record in records])
    return replace(
        records[0],
        router_logits=change([record.router_logits for record in records]),
        selected_experts=change([record.selected_experts for record in records]),
        routing_weights=change([record.routing_weights for record in records]),
        extra=extra,
    )
