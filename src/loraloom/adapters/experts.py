"""What methods with experts share: settings, a router, and LoRA experts of a projection's own.

Axes: T tokens, I in_features, E experts, K slots of a token, R rank, S = E·R.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from loraloom.adapters.contract import MAX_NUMBER, AdapterConfig, Adjustable
from loraloom.adapters.lora_projection import LoraProjection
from loraloom.adapters.low_rank import LowRankConfig, initial_weight
from loraloom.adapters.segment import Records, Samples, SegmentTokens
from loraloom.adapters.tensor_names import Weights
from loraloom.base.blocks import BaseLayer, BaseProjection
from loraloom.errors import AdapterError
from loraloom.routing.losses import AddUp, keep, router_loss
from loraloom.routing.routes import Dense, Route, Switch, TopK, TopP, router_logits

ExpertCount = Annotated[int, Field(ge=1, le=2**10)]
# A token's experts, best first, their weights, [T, K] both, and what else to record, [T, …] each.
Choice = tuple[Tensor, Tensor, Mapping[str, Tensor]]


def too_large(name: str, value: int, limit: str, most: int) -> Iterator[str]:
    """Yield the fault of a setting that is more than another one, if it is."""
    if value > most:
        yield f"{name} must be in [1, {limit}={most}], got {value}"


def check_has_experts(config: AdapterConfig, base_layers: Sequence[BaseLayer]) -> None:
    """Raise an AdapterError if experts that are on FFN projections would be on none."""
    keys = config.targeted_keys(base_layers)
    adapted = set[str]()
    in_ffn = dict[str, None]()
    for layer in base_layers:
        for block in layer.blocks:
            names = block.names_of(keys)
            if names and block.is_feed_forward:
                return
            adapted.update(names)
            if block.is_feed_forward:
                in_ffn |= dict.fromkeys(block.projections)
    raise AdapterError(
        f"{config.title} requires experts: target_modules must include a linear layer of the "
        f"FFN ({', '.join(in_ffn) or 'of which this base model has none'}), "
        f"got {', '.join(sorted(adapted))}; use a plain adapter for attention"
    )


class MixtureConfig(LowRankConfig):
    """What methods share whose routers weigh a number of experts."""

    num_experts: Any = 8  # or a number for each layer, where a method says so

    @property
    def experts_per_router(self) -> int:
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts)


class RouterLossConfig(AdapterConfig):
    """Losses on routers that choose a few experts for each token."""

    router_aux_loss_coef: Adjustable[float] = Field(default=0.01, ge=0, le=MAX_NUMBER)
    """Weight of the load-balance loss; with equal shares it is coefficient × top_k."""
    router_z_loss_coef: Adjustable[float] = Field(default=0.0, ge=0, le=MAX_NUMBER)
    """Weight of the mean squared logsumexp of the router's logits."""
    router_loss_scope: Adjustable[Literal["pooled", "per_layer"]] = "pooled"
    """Load over all routers together, as the reference has it, or the mean of each one's loss."""

    @property
    def collapse_advice(self) -> str:
        advice = "raise router_aux_loss_coef"
        if self.router_loss_scope == "pooled":
            advice += ", set router_loss_scope: per_layer,"
        return f"{advice} or {super().collapse_advice}"

    def auxiliary_loss(
        self, routing: Records, samples: Samples = None, add_up: AddUp = keep
    ) -> Tensor | None:
        if not routing:
            return None
        return router_loss(
            routing,
            self.router_aux_loss_coef,
            self.router_z_loss_coef,
            self.router_loss_scope,
            add_up,
        )


# The routing that each setting belongs to.
_ROUTING_OF = {
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "top_p",
    "expert_capacity": "switch",
}


class RoutingConfig(RouterLossConfig, MixtureConfig):
    """How routers choose among experts, by p, the softmax of their logits."""

    routing: Literal["top_k", "top_p", "switch", "dense"] = "top_k"
    """Which experts a token uses: the top_k of largest p, with p renormalized to sum to 1; the
    fewest whose p sum to more than top_p, with p; that of largest p, with p (switch); or all."""
    top_k: int = Field(default=2, ge=1)
    """Experts that each token uses, with routing: top_k."""
    top_p: float = Field(default=0.8, gt=0, le=1)
    """Probability that a token's experts must exceed together, with routing: top_p."""
    temperature: float = Field(default=1.0, gt=0, le=MAX_NUMBER)
    """Divisor of the logits, with routing: top_p."""
    expert_capacity: Adjustable[int | None] = Field(default=None, ge=1)
    """Tokens of a sample that an expert accepts in training, with routing: switch. Further tokens
    skip the experts. null: no limit."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for name, routing in _ROUTING_OF.items():
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if routing != self.routing and not is_default:
                yield f"{name} requires routing: {routing}, got {self.routing}"
        if self.routing == "top_k":
            counts = self.num_experts
            fewest = counts if isinstance(counts, int) else min(counts, default=0)
            yield from too_large("top_k", self.top_k, "num_experts", fewest)

    @property
    def route(self) -> Route:
        match self.routing:
            case "top_k":
                return TopK(self.top_k)
            case "top_p":
                return TopP(self.top_p, self.temperature)
            case "switch":
                return Switch()
            case "dense":
                return Dense()

    @property
    def experts_per_token(self) -> int | None:
        if self.routing == "top_k":
            return self.top_k
        return 1 if self.routing == "switch" else None


class Router(Weights):
    """A gate's weight, [E, I]: normal with `std`, or Kaiming uniform as linear layers begin."""

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        seed: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        std: float | None = None,
    ):
        super().__init__()
        self.key = key
        initial = initial_weight(shape, seed, key, std)
        self.weight = nn.Parameter(initial.to(dtype=dtype, device=device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield self.key, self.weight.detach()


def router_on(base: BaseProjection, num_experts: int, dtype: torch.dtype, seed: int) -> Router:
    shape = (num_experts, base.in_features)
    return Router(f"{base.key}.router", shape, seed, dtype=dtype, device=base.device)


class RoutedProjection(LoraProjection):
    """The LoRA experts of a projection, and the router whose `route` chooses among them.

    If `num_experts` is None, each rank of one LoRA is an expert.
    """

    def __init__(
        self,
        base: BaseProjection,
        config: LowRankConfig,
        num_experts: int | None,
        route: Route,
        dtype: torch.dtype,
        seed: int,
        capacity: int | None = None,  # tokens of a sample for an expert, in training; None: any
    ):
        super().__init__(base, config, num_experts, dtype, seed)
        self.route = route
        self.capacity = capacity
        self.router = router_on(base, num_experts or config.rank, dtype, seed)

    def choose(self, logits: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Choice:
        """Choose experts by the logits, [T, E]; a method of yours may look at x, [T, I], too."""
        selected, weights = self.route(logits)
        return selected, weights, {}

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Between A and B, weigh the columns of the token's experts, and zero all others."""
        logits = router_logits(hidden_states, self.router.weight)
        selected, expert_weights, extra = self.choose(logits, hidden_states, tokens)  # [T, K] each
        tokens.record_routing(logits, selected, expert_weights, self.path, extra)
        # The record is of what the router wanted; an expert that is full adds nothing.
        beyond = tokens.beyond_capacity(selected, self.capacity)
        if beyond is not None:
            expert_weights = expert_weights.masked_fill(beyond, 0)
        weights = torch.zeros_like(logits).scatter(1, selected, expert_weights)  # [T, E]
        columns = weights.to(low_rank.dtype)
        columns_per_expert = low_rank.shape[1] // weights.shape[1]
        if columns_per_expert > 1:
            columns = columns.repeat_interleave(columns_per_expert, dim=1)
        return low_rank * columns  # [T, S]
