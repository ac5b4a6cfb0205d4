"""What the rest of the system asks of a method's configuration. Torch is not imported here.

A method is a folder beside this file: `config.py` with a subclass of `AdapterConfig`, and the
weights that its `build` makes. `docs/methods.md` says how to add one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from loraloom.adapters.keys import Shape, TensorKey, target_projections
from loraloom.adapters.own import own_shapes
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import AdapterError, ConfigError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles, Sidecar, SidecarFiles
    from loraloom.routing.routes import Route

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
    old_strategies: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of `routing_strategy` in the reference's old files, and what they are today."""
    file_parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of the method's own parts of tensors in PEFT's or the reference's files."""
    sidecar: ClassVar[Sidecar | None] = None
    """Files that another program writes for the method beside PEFT's two; see `adopted`."""

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
    def starts_from_data(self) -> bool:
        """Whether initial weights depend on the training data; `started` gives them then."""
        return False

    @property
    def takes_start_off(self) -> bool:
        """Whether the start of the update is taken off the base's weights."""
        return False

    def started(
        self, model: Any, batches: Sequence[Mapping[str, Tensor]], base: BaseInfo
    ) -> tuple[AdapterConfig, dict[str, Tensor]]:
        """Look at training data on the base model.

        Args:
            model: The base model, of transformers.
            batches: `input_ids`, `attention_mask` and `labels` of some rows each, [B, L].
            base: Describes the model.

        Returns:
            The settings of an adapter that starts from the data, and those of its initial weights
            that the data tells, by our keys.

        Raises:
            ConfigError: If the data is too little, or what computes it is not installed.
        """
        return self, {}

    @abstractmethod
    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """Give the key and shape of each tensor of an adapted projection.

        Args:
            place: The key without its part.
            out_features: O of the base's projection.
            in_features: I.
        """

    def layer_shapes(self, base: BaseInfo, layer: int) -> Iterator[tuple[TensorKey, Shape]]:
        """Give the key and shape of each tensor of a decoder layer."""
        for path in target_projections(self.target_modules, base, layer):
            block, _, projection = path.partition(".")
            place = TensorKey(layer, block, "", projection)
            yield from self.projection_shapes(place, *base.shapes[path])

    def tensor_shapes(self, base: BaseInfo) -> dict[str, Shape]:
        """Give the name and shape of every tensor that an adapter has on a base model."""
        shapes = {
            str(key): shape
            for layer in range(base.num_layers)
            for key, shape in self.layer_shapes(base, layer)
        }
        return shapes | own_shapes(self, base)

    @property
    def in_every_layer(self) -> bool:
        """Whether every decoder layer has all target modules."""
        return True

    def targets_in(self, layer: BaseLayer) -> frozenset[str]:
        """Name the projections that an adapter has in a layer.

        Raises:
            AdapterError: If `target_modules` names projections that the base model lacks.
        """
        from loraloom.adapters.adapter import resolve_targets

        return resolve_targets(self, layer)

    def known_targets(self, base: BaseInfo) -> Targets:
        """Name those of `target_modules` that a base model has, in its order."""
        paths = target_projections(self.target_modules, base)
        return tuple(path.rpartition(".")[2] for path in paths)

    def check_targets(self, paths: Sequence[str], base: BaseInfo) -> str | None:
        """Say what is wrong with the projections that files name; None if nothing is."""
        return None

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

    def card_lines(self) -> list[str]:
        """What a model card lists beside rank and targets."""
        return []

    def summary(self) -> dict[str, Any]:
        """The settings that decide what the weights compute, for `inspect` and `start_from`."""
        return {"rank": self.rank}

    def description(self) -> dict[str, Any]:
        """The settings that `loraloom inspect` shows beside rank and dropout."""
        return {"alpha": None, "scaling": None, "rank_stabilized": False, "experts": None}

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """The method's fields of adapter_config.json; by default its settings under our names."""
        return self.model_dump(mode="json")

    def reference_fault(self, base: BaseInfo) -> str | None:
        """Say what of this MoE-PEFT's files can't hold; None if they hold it all."""
        return f"MoE-PEFT has no {self.title}"

    def split_for_sidecar(
        self, tensors: Mapping[str, Tensor], base: BaseInfo
    ) -> tuple[AdapterConfig, SidecarFiles]:
        """Give what PEFT's two files hold, and what goes into the sidecar beside them.

        Raises:
            AdapterError: If the program whose sidecar it is can't hold this.
        """
        raise AdapterError(f"axolotl has mixtures of whole FFN blocks alone, got {self.title}")

    @classmethod
    def adopted(cls, files: AdapterFiles) -> AdapterFiles:
        """Bring what another program has written for this method into the method's own layout.

        Raises:
            FormatError: If it is of this method and can't be understood.
        """
        return files

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """Read settings from adapter_config.json, the other way round.

        Args:
            files: What was found on disk.
            projections: Names of the projections that have tensors.

        Raises:
            FormatError: If a field says what the method can't represent.
        """
        known = {name: files.config[name] for name in cls.model_fields if name in files.config}
        targets = files.targets(projections)
        return known | ({"target_modules": targets} if targets else {})


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
        """See AdapterConfig."""
        return self.scaling

    def combined(self, others: Sequence[AdapterConfig], targets: Targets) -> AdapterConfig:
        """See AdapterConfig: the largest rank, and a scaling of 1."""
        rank = max(config.rank for config in (self, *others))
        own = {"rank": rank, "alpha": float(rank), "rank_stabilized": False}
        return type(self).model_validate({**self.model_dump(), **own, "target_modules": targets})

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        return {"rank": self.rank, "scaling": self.scaling}

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        kind = " (rank-stabilized)" if self.rank_stabilized else ""
        return [f"alpha {self.alpha:g}{kind}"]

    def description(self) -> dict[str, Any]:
        """See AdapterConfig."""
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
        """See AdapterConfig."""
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts)

    @property
    def routing_label(self) -> str:
        """Which experts a token uses, for people."""
        return "dense"

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        return super().summary() | {"num_experts": self.num_experts}

    def description(self) -> dict[str, Any]:
        """See AdapterConfig."""
        return super().description() | {"experts": self.experts_described()}

    def experts_described(self) -> dict[str, Any]:
        """How many experts there are, who uses them and what each is, for `inspect`."""
        top_k = self.experts_per_token or self.experts_per_router
        taken = {"num_experts": self.num_experts, "top_k": top_k, "routing": self.routing_label}
        return taken | self.model_dump(include={"rank", "alpha", "dropout"})


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
        from loraloom.routing.routes import Dense, Switch, TopK, TopP

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
        """See AdapterConfig; where it differs by token, or all are used, none."""
        return {"top_k": self.top_k, "switch": 1}.get(self.routing)


def _check_top_k(top_k: int, num_experts: Any) -> None:
    counts = [num_experts] if isinstance(num_experts, int) else num_experts
    if top_k > min(counts, default=0):
        raise ValueError(f"top_k must be in [1, num_experts={min(counts, default=0)}], got {top_k}")


def _is_module_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name not in get_args(TargetGroup)
