"""What methods with experts share: a router, and LoRA experts with a router of a projection's own.

Axes: T tokens, I in_features, E experts, K slots of a token, R rank, S = E·R.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import SegmentTokens, Weights
from loraloom.adapters.base import BaseProjection
from loraloom.adapters.config import LowRankConfig
from loraloom.adapters.lora import LoraProjection
from loraloom.adapters.low_rank import generator_for, kaiming_uniform
from loraloom.routing.routes import Route, router_logits


class Router(Weights):
    """A gate's weight, [E, I].

    Args:
        key: Its name in files.
        shape: [E, I].
        seed: Of the job.
        dtype: At least float32.
        device: Where the base's projection computes.
        std: Deviation of the initial values; None: Kaiming uniform, as linear layers begin.
        has_bias: Whether a bias balances the load, [E], which starts at 0; see `balance_by_bias`.
    """

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        seed: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        std: float | None = None,
        has_bias: bool = False,
    ):
        super().__init__()
        self.key = key
        if std is None:
            initial = kaiming_uniform(shape, seed, key)
        else:
            initial = torch.empty(shape).normal_(std=std, generator=generator_for(seed, key))
        self.weight = nn.Parameter(initial.to(dtype=dtype, device=device))
        self.bias = None
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield self.key, self.weight.detach()
        if self.bias is not None:
            yield f"{self.key}_bias", self.bias.detach()


class RoutedProjection(LoraProjection):
    """The LoRA experts of a projection, and the router that chooses among them.

    Args:
        base: The projection that is adapted.
        config: Rank, scaling, initialisation.
        num_experts: E.
        route: What the router does with its logits.
        dtype: Of the trained weights, at least float32.
        seed: Of the job.
        capacity: Tokens of a sample that an expert takes in training; None for any number.
    """

    maps_rank_space = True

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_experts: int,
        route: Route,
        dtype: torch.dtype,
        seed: int,
        capacity: int | None = None,
    ):
        super().__init__(base, config, num_experts, dtype, seed)
        self.route = route
        self.capacity = capacity
        shape = (num_experts, base.in_features)
        self.router = Router(f"{self.key}.router", shape, seed, dtype=dtype, device=base.device)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Weigh the columns of the token's experts, and zero all others."""
        logits = router_logits(hidden_states, self.router.weight)
        selected, chosen = self.route(logits)  # (T, K)
        tokens.record_routing(logits, selected, chosen, self.path)
        beyond = tokens.beyond_capacity(selected, self.capacity)
        if beyond is not None:
            chosen = chosen.masked_fill(beyond, 0)
        weights = torch.zeros_like(logits).scatter(1, selected, chosen)  # (T, E)
        columns = weights.to(low_rank.dtype).repeat_interleave(self.config.rank, dim=1)
        return low_rank * columns  # (T, S)
