"""What the rest of the system asks of a method's configuration.

A method is a file beside this one: a subclass of `AdapterConfig`, and the weights that its `build`
makes. `docs/methods.md` says how to add one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, field_validator

from loraloom.adapters.base import BaseInfo, BaseLayer
from loraloom.adapters.keys import Shape, TensorKey, target_projections
from loraloom.adapters.own import own_shapes
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import AdapterError, ConfigError, shown
from loraloom.routing.routes import Dense, Route, Switch, TopK, TopP

if TYPE_CHECKING:
    from loraloom.adapters.adapter import Adapter

MAX_RANK, MAX_EXPERTS, MAX_NUMBER = 2**16, 2**10, 1e6
"""Bounds far from what anybody trains, so that a slip or malice ends in a message."""

ExpertCount = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
TokenIds = tuple[Annotated[int, Field(ge=0)], ...]
TargetGroup = Literal["all-linear", "attention", "ffn"]
Targets = TargetGroup | tuple[str, ...]


class AdapterConfig(StrictModel, ABC):
    """The settings that all methods have, and the questions that all must answer."""

    adds_up_over_ranks: ClassVar[bool] = True
    """Whether its auxiliary loss is known to a rank that has only a part of the tokens."""
    experts_have_tensors: ClassVar[bool] = True
    """Whether each expert has tensors of its own."""
    trains_B: ClassVar[bool] = True
    """Whether it has up-projections `lora_B` that are trained."""
    peft_type: ClassVar[str]
    """What adapter_config.json calls the method."""
    layout: ClassVar[Literal["peft", "reference", "native"]] = "native"
    """How tensors are named on disk; see formats/."""
    title: ClassVar[str]
    """The method as papers spell it; a property where a setting makes a variant of it."""
    formula: ClassVar[str]
    """What an adapted projection computes, in a line."""
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names that people give as `method` for settings of this one, and what to write instead."""

    method: str
    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    """Rank of the update."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update, in training only."""
    target_modules: Targets = "all-linear"
    """Projections to adapt: their names, or `all-linear`, `attention`, `ffn`."""
    modules_to_save: tuple[str, ...] = ()
    """Modules outside of the projections that the adapter trains whole, as a copy of its own:
    `embed_tokens`, `lm_head`, norms; names or the ends of paths, as in PEFT."""
    trainable_token_indices: TokenIds | dict[str, TokenIds] = ()
    """Tokens whose embeddings the adapter trains, as rows of its own; where the base model ties its
    head to the embeddings, the head has them too. By the name of the embedding or the head:
    `{embed_tokens: [7], lm_head: [7, 8]}`."""
    ensure_weight_tying: bool = False
    """Train one copy for embedding and head in modules_to_save, where the base model has one."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, targets: Any) -> Any:
        groups = get_args(TargetGroup)
        is_list = isinstance(targets, list | tuple)
        if targets in groups or (is_list and targets and all(_is_module_name(t) for t in targets)):
            return targets
        raise ValueError(
            f"target_modules must be {', '.join(groups)} or a list of module names, got "
            f"{shown(targets)}"
        )

    @field_validator("trainable_token_indices")
    @classmethod
    def _check_tokens_differ(cls, given: Any) -> Any:
        for tokens in given.values() if isinstance(given, dict) else [given]:
            if len(set(tokens)) < len(tokens):
                raise ValueError(f"trainable_token_indices must differ, got {shown(list(tokens))}")
        return given

    @abstractmethod
    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """Make an adapter with initial weights.

        Args:
            name: Unique on its host.
            base_layers: The base model's projections.
            dtype: Of the trained weights, at least float32.
            seed: Of the initial weights, together with each tensor's name.

        Raises:
            AdapterError: If `target_modules` names projections that the base model lacks.
        """

    @property
    def takes_start_off(self) -> bool:
        """Whether the start of the update is taken off the base's weights."""
        return False

    def tensor_shapes(self, base: BaseInfo) -> dict[str, Shape]:
        """Give the name and shape of every tensor that an adapter has on a base model.

        They are read off one that is built without memory.

        Raises:
            AdapterError: If the settings don't fit the base model.
        """
        with torch.device("meta"):
            adapter = self.build("shapes", base.layers_without_weights(), torch.float32, seed=0)
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
        return shapes | own_shapes(self, base)

    @property
    def in_every_layer(self) -> bool:
        """Whether every decoder layer has all target modules."""
        return True

    def targets_in(self, layer: BaseLayer) -> frozenset[str]:
        """Name the projections that an adapter has in a layer, which may lack some of its targets.

        Raises:
            AdapterError: If `target_modules` names projections that the base model lacks.
        """
        groups = {"attention": frozenset(layer.attention), "ffn": frozenset(layer.ffn)}
        groups["all-linear"] = groups["attention"] | groups["ffn"]
        known, targets = groups["all-linear"] | layer.absent, self.target_modules
        if targets == "ffn" and not groups["ffn"]:
            raise AdapterError(
                "target_modules must have projections on the base model, got ffn where its FFN "
                "blocks are mixtures of experts themselves; take attention"
            )
        if isinstance(targets, str):
            return groups[targets]
        unknown = sorted(set(targets) - known)
        if unknown or not targets:
            raise AdapterError(
                f"target_modules must name projections of the base model "
                f"({', '.join(sorted(known))}) or be all-linear, attention or ffn; "
                f"got {', '.join(unknown) or 'an empty list'}"
            )
        return frozenset(targets)

    def known_targets(self, base: BaseInfo) -> Targets:
        """Name those of `target_modules` that a base model has, in its order."""
        paths = target_projections(self.target_modules, base)
        return tuple(path.rpartition(".")[2] for path in paths)

    @property
    def experts_per_token(self) -> int | None:
        """How many experts a router chooses for a token; None where it chooses none."""
        return None

    @property
    def experts_per_router(self) -> int:
        """The most experts that a router chooses from; 0 without routers."""
        return 0

    @property
    def has_expert_groups(self) -> bool:
        """Whether its loss tells samples of two groups apart, the `expert_group` of their data."""
        return False

    @property
    def routes_outside_training(self) -> bool:
        """Whether routers choose experts for tokens that nothing is learnt of."""
        return self.experts_per_router > 0

    @property
    def collapse_advice(self) -> str:
        """What to change where routers send all tokens to the same few experts."""
        return "lower learning_rate"

    def combined(self, others: Sequence[AdapterConfig], targets: Targets) -> AdapterConfig:
        """Give the settings of an adapter that others of this method were combined to.

        Raises:
            AdapterError: If the method's updates can't be.
        """
        raise AdapterError(
            f"adapters that are combined must have updates of the form BA, {self.title} hasn't; "
            "give their rows scales instead"
        )

    def scaling_of(self, key: TensorKey) -> float:
        """The factor of an update, whose B and A are at a place."""
        return 1.0

    def summary(self) -> dict[str, Any]:
        """The settings that decide what the weights compute, for `inspect` and `start_from`."""
        return {"rank": self.rank}

    def description(self) -> dict[str, Any]:
        """The settings that `loraloom inspect` shows beside rank and dropout."""
        return {"alpha": None, "scaling": None, "rank_stabilized": False, "experts": None}


def check_config(config: object) -> AdapterConfig:
    """Return a configuration as it came.

    Raises:
        ConfigError: If it is of another library, or none.
    """
    if isinstance(config, AdapterConfig):
        return config
    kind = type(config)
    raise ConfigError(
        f"an adapter's configuration must be one of loraloom's, got {kind.__module__}."
        f"{kind.__qualname__}; write loraloom.LoraConfig(rank=8, alpha=16), or load an adapter "
        "that PEFT has saved with host.load"
    )


def check_has_experts(config: AdapterConfig, layer: BaseLayer) -> None:
    """Raise an AdapterError if experts that are on FFN projections would be on none."""
    targets = config.targets_in(layer)
    if not layer.ffn:
        raise AdapterError(
            f"{config.title} needs an FFN block of linear layers, this base model's are mixtures "
            "of experts themselves; take a plain adapter, on attention"
        )
    if not targets & frozenset(layer.ffn):
        raise AdapterError(
            f"{config.title} needs experts: target_modules must have at least one of "
            f"{', '.join(layer.ffn)}, got {', '.join(sorted(targets))}"
        )


class LowRankConfig(AdapterConfig):
    """What methods share whose updates are s·B(A(x)), with one rank and scaling."""

    alpha: float = Field(default=32.0, gt=0, le=MAX_NUMBER)
    """Numerator of the scaling s = alpha / rank (alpha / sqrt(rank) when rank_stabilized)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank), as rsLoRA does."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of A: Kaiming uniform with a = sqrt(5), or normal with std 1 / rank. B starts at 0."""

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def scaling_of(self, key: TensorKey) -> float:
        return self.scaling

    def combined(self, others: Sequence[AdapterConfig], targets: Targets) -> AdapterConfig:
        """See AdapterConfig: the largest rank, and a scaling of 1."""
        rank = max(config.rank for config in (self, *others))
        own = {"rank": rank, "alpha": float(rank), "rank_stabilized": False}
        return type(self).model_validate({**self.model_dump(), **own, "target_modules": targets})

    def summary(self) -> dict[str, Any]:
        return {"rank": self.rank, "scaling": self.scaling}

    def description(self) -> dict[str, Any]:
        return super().description() | {
            "alpha": self.alpha,
            "scaling": self.scaling,
            "rank_stabilized": self.rank_stabilized,
        }


class MixtureConfig(LowRankConfig):
    """What methods share whose routers weigh a number of experts."""

    num_experts: Any = 8

    @property
    def experts_per_router(self) -> int:
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts)

    @property
    def routing_label(self) -> str:
        """Which experts a token uses, for people."""
        return "dense"

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"num_experts": self.num_experts}

    def description(self) -> dict[str, Any]:
        top_k = self.experts_per_token or self.experts_per_router
        taken = {"num_experts": self.num_experts, "top_k": top_k, "routing": self.routing_label}
        own = self.model_dump(include={"rank", "alpha", "dropout"})
        return super().description() | {"experts": taken | own}


class RouterLossConfig(StrictModel):
    """Losses on routers that choose a few experts for each token."""

    router_aux_loss_coef: float = Field(default=0.01, ge=0, le=MAX_NUMBER)
    """Weight of the load-balance loss; its minimum is coefficient × top_k."""
    router_z_loss_coef: float = Field(default=0.0, ge=0, le=MAX_NUMBER)
    """Weight of the mean squared logsumexp of the router's logits."""
    router_loss_scope: Literal["pooled", "per_layer"] = "pooled"
    """Load over all routers together, as the reference has it, or the mean of each one's loss."""

    @property
    def collapse_advice(self) -> str:
        """What to change where routers send all tokens to the same few experts."""
        per_layer = self.router_loss_scope == "per_layer"
        scope = "" if per_layer else ", set router_loss_scope: per_layer"
        return (
            f"raise router_aux_loss_coef (it is {self.router_aux_loss_coef:g}){scope}, or lower "
            "learning_rate"
        )


_ROUTING_OF = {
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "top_p",
    "expert_capacity": "switch",
}
"""The routing that each setting belongs to."""


class RoutingConfig(RouterLossConfig, MixtureConfig):
    """How routers choose among experts, by p, the softmax of their logits."""

    routing: Literal["top_k", "top_p", "switch", "dense"] = "top_k"
    """Which experts a token uses: the top_k of largest p, with p renormalised to sum to 1; the
    fewest whose p sum to more than top_p, with p; that of largest p, with p (switch); or all."""
    top_k: int = Field(default=2, ge=1, validate_default=True)
    """Experts that each token uses, with routing: top_k."""
    top_p: float = Field(default=0.8, gt=0, le=1, validate_default=True)
    """What the p of a token's experts have to exceed together, with routing: top_p."""
    temperature: float = Field(default=1.0, gt=0, le=MAX_NUMBER, validate_default=True)
    """What the logits are divided by, with routing: top_p."""
    expert_capacity: int | None = Field(default=None, ge=1, validate_default=True)
    """Tokens of a sample that an expert takes in training, with routing: switch; those beyond it go
    without an expert. None: any number."""

    @field_validator("top_k", "top_p", "temperature", "expert_capacity")
    @classmethod
    def _check_routing(cls, value: Any, info: CheckInfo) -> Any:
        name, routing = info.field_name or "", info.data.get("routing")
        if routing not in (None, _ROUTING_OF[name]) and value != cls.model_fields[name].default:
            raise ValueError(
                f"{name} is a setting of routing: {_ROUTING_OF[name]}, got {value} with routing: "
                f"{routing}"
            )
        if name == "top_k" and routing == "top_k":
            _check_top_k(value, info.data.get("num_experts", value))
        return value

    @property
    def route(self) -> Route:
        """What routers do with their logits."""
        if self.routing == "top_k":
            return TopK(self.top_k)
        if self.routing == "top_p":
            return TopP(self.top_p, self.temperature)
        return Switch() if self.routing == "switch" else Dense()

    @property
    def routing_label(self) -> str:
        """The routing with its number, for people."""
        numbers = {"top_k": f"top-{self.top_k}", "top_p": f"top-p {self.top_p:g}"}
        return numbers.get(self.routing, self.routing)

    @property
    def experts_per_token(self) -> int | None:
        return {"top_k": self.top_k, "switch": 1}.get(self.routing)


def _check_top_k(top_k: int, num_experts: Any) -> None:
    counts = [num_experts] if isinstance(num_experts, int) else num_experts
    if top_k > min(counts, default=0):
        raise ValueError(f"top_k must be in [1, num_experts={min(counts, default=0)}], got {top_k}")


def _is_module_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name not in get_args(TargetGroup)
