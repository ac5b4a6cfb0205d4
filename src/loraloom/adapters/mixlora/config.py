"""Settings of MixLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from loraloom.adapters.config import (
    MAX_NUMBER,
    MAX_RANK,
    AdapterConfig,
    ExpertCount,
    RoutingConfig,
    Targets,
)
from loraloom.adapters.keys import Shape, TensorKey
from loraloom.adapters.lora.config import DecomposedConfig, LoraConfig
from loraloom.adapters.mixlora import axolotl
from loraloom.adapters.mixlora.files import reference_fields, settings_of
from loraloom.adapters.reference import alpha_fault, lora_fault, without_experts
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles, SidecarFiles
    from loraloom.routing.routes import Route


class ExpertsConfig(StrictModel):
    """The experts' settings where they differ from the attention LoRA's; None takes those."""

    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Rank of each expert."""
    alpha: float | None = Field(default=None, gt=0, le=MAX_NUMBER)
    """Numerator of the experts' scaling."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the experts' inputs, in training only."""
    rank_stabilized: bool | None = None
    """Scale the experts by alpha / sqrt(rank)."""
    weight_decomposition: bool | None = None
    """Decompose the experts' weights, as DoRA does."""


class SharedExpertConfig(StrictModel):
    """A LoRA that all experts of an FFN block have beside their own."""

    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Its rank; None: that of an expert."""
    alpha: float | None = Field(default=None, gt=0, le=MAX_NUMBER)
    """Numerator of its scaling; None: that of the experts."""


class MixLoraConfig(RoutingConfig, DecomposedConfig):
    """A router and several LoRA experts in each FFN block, plain LoRA on attention.

    Source: Li et al. 2024, MixLoRA, arXiv:2404.15159.
    """

    peft_type = "MIXLORA"
    layout = "reference"
    formula = "FFN(x) = Σ_j g_j · W_d'_e(j)(act(W_g'_e(j) x) ∘ W_u'_e(j) x), W' = W + sBA"
    aliases: ClassVar = {"mixdora": "method: mixlora with weight_decomposition: true"}
    old_strategies: ClassVar = {"mixtral": "mixlora", "switch": "mixlora-switch"}
    sidecar = axolotl.SIDECAR

    method: Literal["mixlora"] = "mixlora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Mixture of LoRA experts in the FFN blocks."""
    num_experts: ExpertCount = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    """Experts in each FFN block."""
    compat: Literal["moe-peft"] | None = None
    """Compute what MoE-PEFT 2.0.2 does where it differs from the method: with routing: top_p the
    temperature divides probabilities; with switch a block outside of training returns its input."""
    experts: ExpertsConfig | None = None
    """The experts' own rank, alpha and dropout where they differ."""
    shared_expert: SharedExpertConfig | None = None
    """A LoRA on the FFN block that every token goes through, whatever its experts; null for none.

    Each expert's W' is then W + sBA + s'B'A', with B' and A' the same in all of them, so that the
    experts need not learn apart what all tokens have in common (after Dai et al. 2024, DeepSeekMoE,
    arXiv:2401.06066)."""
    router_bias: bool = False
    """Balance the load by a bias on the choice of experts, which their weights don't have: it rises
    where an expert gets less than an even share (Wang et al. 2024, arXiv:2408.15664). It learns at
    ten times the routers' rate; router_aux_loss_coef may then be 0."""
    router_init_std: float = Field(default=0.02, gt=0, le=MAX_NUMBER)
    """Standard deviation of the router's initial weights."""
    router_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiply the router's input by noise in [1 - jitter, 1 + jitter], in training only."""

    @field_validator("target_modules")
    @classmethod
    def _check_ffn_is_targeted(cls, targets: Targets) -> Targets:
        if targets == "attention":
            raise ValueError(
                "target_modules must take in the FFN, where a mixture has its experts, got "
                "'attention'; take all-linear or ffn, or method: lora"
            )
        return targets

    @field_validator("compat")
    @classmethod
    def _check_compat(cls, compat: str | None, info: CheckInfo) -> str | None:
        if compat is not None and info.data.get("routing") not in (None, "top_p", "switch"):
            raise ValueError(
                f"compat must be unset where MoE-PEFT computes what the method means, got "
                f"{compat} with routing: {info.data['routing']}"
            )
        return compat

    @model_validator(mode="after")
    def _check_extras(self) -> MixLoraConfig:
        if self.router_bias and self.routing != "top_k":
            raise ValueError(f"router_bias is a setting of routing: top_k, got {self.routing}")
        if self.shared_expert is not None and self.expert_config.weight_decomposition:
            raise ValueError(
                "shared_expert can't be used with weight_decomposition, whose norms are of one "
                "update alone; leave one of them out"
            )
        return self

    @property
    def routes_outside_training(self) -> bool:
        """See AdapterConfig; a block of MoE-PEFT's switch returns its input then."""
        return self.compat is None or self.routing != "switch"

    @property
    def expert_config(self) -> LoraConfig:
        """The experts as a plain LoRA's configuration, with what they inherit filled in."""
        own = {} if self.experts is None else self.experts.model_dump(exclude_none=True)
        names = DecomposedConfig.model_fields.keys() - {"method"}
        shared = {name: getattr(self, name) for name in names}
        return LoraConfig(**{**shared, **own})

    @property
    def shared_config(self) -> LoraConfig | None:
        """The shared expert as a plain LoRA's configuration; None without one."""
        if self.shared_expert is None:
            return None
        own = self.shared_expert.model_dump(exclude_none=True)
        return LoraConfig(**{**self.expert_config.model_dump(), **own})

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """MixLoRA, or MixDoRA where the experts are decomposed."""
        return f"Mix{self.expert_config.title}"

    @property
    def route(self) -> Route:
        """See RoutingConfig."""
        route = super().route
        if self.compat is not None and self.routing == "top_p":
            return replace(route, divides_probabilities=True)  # pyright: ignore
        return route

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.mixlora.adapter import MixLoraAdapter

        return MixLoraAdapter(name, self, base_layers, dtype, seed)

    def layer_shapes(self, base: BaseInfo, layer: int) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig; an FFN projection has the tensors of each expert."""
        yield TensorKey(layer, base.ffn, "router"), (self.num_experts, base.hidden_size)
        if self.router_bias:
            yield TensorKey(layer, base.ffn, "router_bias"), (self.num_experts,)
        for key, shape in super().layer_shapes(base, layer):
            if key.block != base.ffn:
                yield key, shape
            elif key.part == "lora_A":  # once for each projection
                place, expert = replace(key, part=""), self.expert_config
                for number in range(self.num_experts):
                    own = replace(place, expert=number)
                    out_features, in_features = base.shapes[key.path]
                    yield from expert.projection_shapes(own, out_features, in_features)
                if self.shared_config is not None:
                    sizes = base.shapes[key.path]
                    yield from self.shared_config.projection_shapes(place, *sizes)

    def check_targets(self, paths: Sequence[str], base: BaseInfo) -> str | None:
        """See AdapterConfig."""
        if any(path.startswith(f"{base.ffn}.") for path in paths):
            return None
        names = ", ".join(base.ffn_projections)
        return f"a mixture must have experts on an FFN projection, one of {names}; got none"

    def scaling_of(self, key: TensorKey) -> float:
        """See AdapterConfig."""
        return self.scaling if key.expert is None else self.expert_config.scaling

    def combined(self, others: Sequence[AdapterConfig], targets: Targets) -> AdapterConfig:
        """See AdapterConfig; the experts have a rank of their own."""
        mixtures = [config for config in (self, *others) if isinstance(config, MixLoraConfig)]
        if any(config.shared_expert or config.router_bias for config in mixtures):
            raise AdapterError(
                "mixtures that are combined must have no shared_expert and no router_bias; give "
                "their rows scales instead"
            )
        rank = max(config.expert_config.rank for config in mixtures)
        kept = self.expert_config.model_dump(include={"dropout", "weight_decomposition"})
        experts = {**kept, "rank": rank, "alpha": float(rank)}
        settings = super().combined(others, targets).model_dump()
        return type(self).model_validate({**settings, "experts": experts})

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        expert, shared = self.expert_config, self.shared_config
        lines = [
            *super().card_lines(),
            f"{self.num_experts} experts in each FFN, routing {self.routing_label}",
            f"experts: rank {expert.rank}, alpha {expert.alpha:g}, dropout {expert.dropout:g}",
        ]
        if shared is not None:
            lines.append(f"shared expert: rank {shared.rank}, alpha {shared.alpha:g}")
        return lines

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        expert, shared = self.expert_config, self.shared_config
        summary = super().summary() | {
            "routing": self.routing_label,
            "temperature": self.temperature,
            "compat": self.compat,
            "experts' rank": expert.rank,
            "experts' scaling": expert.scaling,
        }
        if shared is not None:
            summary |= {"shared rank": shared.rank, "shared scaling": shared.scaling}
        return summary

    def experts_described(self) -> dict[str, Any]:
        """See MixtureConfig; they may have a rank of their own."""
        own = self.expert_config.model_dump(include={"rank", "alpha", "dropout"})
        return super().experts_described() | own

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        return reference_fields(self, base)

    def reference_fault(self, base: BaseInfo) -> str | None:
        """See AdapterConfig."""
        if self.expert_config.weight_decomposition:
            return "MoE-PEFT's files have no place for the magnitudes of a MixDoRA"
        if self.shared_expert is not None or self.router_bias:
            return "MoE-PEFT has neither a shared_expert nor a router_bias"
        if self.routing == "top_p" and self.temperature != 1 and self.compat is None:
            return "MoE-PEFT's temperature divides probabilities, not logits"
        return lora_fault(self, base) or alpha_fault(self.expert_config.alpha)

    def split_for_sidecar(
        self, tensors: Mapping[str, Tensor], base: BaseInfo
    ) -> tuple[AdapterConfig, SidecarFiles]:
        """See AdapterConfig."""
        return axolotl.split(self, tensors, base)

    @classmethod
    def adopted(cls, files: AdapterFiles) -> AdapterFiles:
        """See AdapterConfig."""
        if files.config.get("routing_strategy") in (None, "mixlora"):
            files = without_experts(files, cls)
        return axolotl.adopted(files)

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        return settings_of(files, projections)
