"""What a method is given of a running forward, and what it gives back.

Axes: T tokens of one segment, D hidden, E experts, K slots of a token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraloom.ops.dropout import SampleNoise
from loraloom.routing.record import LayerRouting, with_tensors


@dataclass(frozen=True)
class SegmentTokens:
    """An adapter's tokens in a layer."""

    layer: int  # index of the decoder layer
    real: Tensor | None = None  # True at real tokens, [T]; None when there is no padding
    real_index: Tensor | None = None  # their positions
    noise: SampleNoise | None = None  # for dropout and jitter; None outside training
    record: Callable[[LayerRouting], None] | None = None  # of a router; None where nobody asks

    def record_routing(
        self,
        router_logits: Float[Tensor, "T E"],
        selected_experts: Int[Tensor, "T K"],
        routing_weights: Float[Tensor, "T K"],
        projection: str | None = None,
        extra: Mapping[str, Float[Tensor, "T ..."]] = MappingProxyType({}),
    ) -> None:
        """Record what a router did with the real tokens among these."""
        # It is that of a projection, as `self_attn.q_proj`; None for an FFN block's.
        if self.record is None:
            return
        routing = LayerRouting(
            self.layer, router_logits, selected_experts, routing_weights, projection, extra
        )
        # Padding is left out here, so that no loss or count has to know of it.
        real_index = self.real_index
        if real_index is not None:
            routing = with_tensors([routing], lambda parts: parts[0].index_select(0, real_index))
        self.record(routing)

    def beyond_capacity(
        self, selected_experts: Int[Tensor, "T K"], capacity: int | None
    ) -> Tensor | None:
        """Tell which tokens an expert that takes so many of a sample leaves out; None: none."""
        # Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, section 2.2, by sample.
        if capacity is None or self.noise is None:
            return None
        beyond = torch.zeros_like(selected_experts, dtype=torch.bool)
        for span in self.noise.spans:
            selected = selected_experts[span.tokens]  # (t, 1)
            beyond[span.tokens] = count_earlier(selected.squeeze(1)).unsqueeze(1) >= capacity
        return beyond


def count_earlier(selected_experts: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """Count the tokens before each token that selected its expert."""
    by_expert, order = selected_experts.sort(stable=True)
    ranks = torch.arange(len(order), device=order.device)
    starts = torch.searchsorted(by_expert, by_expert)  # where each expert's tokens begin
    return torch.empty_like(order).scatter_(0, order, ranks - starts)


@dataclass(frozen=True)
class SampleTokens:
    """A sample among the tokens of a record: how many are real, and the group of its experts."""

    num_tokens: int
    expert_group: int = 0  # of the experts that are meant for its kind of data, 0 or 1


# What routers did in one forward, an entry for each.
Records = Sequence[LayerRouting]
# Whose tokens records hold, in their order; None where nobody knows.
Samples = Sequence[SampleTokens] | None


@dataclass(frozen=True)
class MoeFfn:
    """An FFN block as mixture-of-experts checkpoints have it: softmax, top_k, renormalized."""

    router: Tensor  # [E, D]
    top_k: int  # experts of each token
    weight: Callable[[int, str, torch.dtype], Tensor]
    """From an expert, a projection's name and a dtype to its whole weight, [O, I]."""

    @property
    def num_experts(self) -> int:
        return len(self.router)
