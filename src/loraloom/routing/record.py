"""What a mixture reports of one layer's routing in a running forward.

Axes: T real tokens, E experts, K top_k.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one adapter's real tokens in one layer; padding is left out.

    Args:
        layer: Index of the decoder layer.
        router_logits: Raw router outputs, [T, E] float32, with gradient in training.
        selected_experts: Chosen experts, best first, [T, K].
        routing_weights: Their weights, [T, K] float32.
    """

    layer: int
    router_logits: Tensor
    selected_experts: Tensor
    routing_weights: Tensor
