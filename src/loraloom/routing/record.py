"""What a router reports of a running forward.

Axes: T real tokens, E experts, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

RouterName = tuple[int, str | None]
"""A layer, and a projection (None for a router of the whole FFN block)."""


def describe_router(router: RouterName) -> str:
    """Name a router for people: `layer 3`, or `layer 3 self_attn.q_proj`."""
    layer, projection = router
    return f"layer {layer}" if projection is None else f"layer {layer} {projection}"


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one adapter's real tokens by one router; padding is left out.

    Args:
        layer: Index of the decoder layer.
        router_logits: Raw router outputs, [T, E] float32, with gradient in training.
        selected_experts: Chosen experts, best first, [T, K].
        routing_weights: Their weights, [T, K] float32.
        projection: Whose router it is, as `self_attn.q_proj`; None for an FFN block's.
    """

    layer: int
    router_logits: Tensor
    selected_experts: Tensor
    routing_weights: Tensor
    projection: str | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_logits.shape[-1]

    @property
    def router(self) -> RouterName:
        """Which router of the adapter it is."""
        return self.layer, self.projection
