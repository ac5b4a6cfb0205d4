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
        """Leave all tokens out; logits stay in their graph."""
        return with_tensors([self], lambda parts: parts[0][:0])

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
    for one in routing:
        rows = zip(one.selected_experts.tolist(), one.routing_weights.tolist(), strict=True)
        by_router.append([RouterChoice(one.router, one.num_experts, *row) for row in rows])
    return [list(choices) for choices in zip(*by_router, strict=True)]


def join_routing(entries: Iterable[LayerRouting]) -> list[LayerRouting]:
    """Put what each router did in several segments of a batch together."""
    by_router: dict[RouterName, list[LayerRouting]] = {}
    for entry in entries:
        by_router.setdefault(entry.router, []).append(entry)
    return [
        parts[0] if len(parts) == 1 else with_tensors(parts, torch.cat)
        for parts in by_router.values()
    ]


def with_tensors(
    parts: Sequence[LayerRouting], change: Callable[[list[Tensor]], Tensor]
) -> LayerRouting:
    """Make one record of a router's, by a function of what they have in each place."""
    return replace(
        parts[0],
        router_logits=change([part.router_logits for part in parts]),
        selected_experts=change([part.selected_experts for part in parts]),
        routing_weights=change([part.routing_weights for part in parts]),
        extra={name: change([part.extra[name] for part in parts]) for name in parts[0].extra},
    )
