"""Settings of MixLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from loraloom.adapters.config import (
    MAX_NUMBER,
    MAX_RANK,
    AdapterConfig,
    ExpertCount,
    RouterLossConfig,
    Targets,
)
from loraloom.adapters.keys import Shape, TensorKey
from loraloom.adapters.lora.config import DecomposedConfig, LoraConfig
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles


class ExpertsConfig(StrictModel):
    """The experts' settings where they differ from the attention LoRA's; None takes those."""

    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Rank of each expert."""
    alpha: float | None = Field(default=None, gt=0, le=MAX_NUMBER)
    """Numerator of the experts' scaling."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the experts' inputs, in training only."""


class SharedExpertConfig(StrictModel):
    """A LoRA that all experts of an FFN block have beside their own."""

    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Its rank; None: that of an expert."""
    alpha: float | None = Field(default=None, gt=0, le=MAX_NUMBER)
    """Numerator of its scaling; None: that of the experts."""


class MixLoraConfig(RouterLossConfig, DecomposedConfig):
    """A router and several LoRA experts in each FFN block, plain LoRA on attention.

    Source: Li et al. 2024, MixLoRA, arXiv:2404.15159.
    """

    peft_type = "MIXLORA"
    layout = "reference"
    formula = "FFN(x) = Σ_j g_j · W_d'_e(j)(act(W_g'_e(j) x) ∘ W_u'_e(j) x), W' = W + sBA"
    aliases: ClassVar = {"mixdora": "method: mixlora with weight_decomposition: true"}
    old_strategies: ClassVar = {"mixtral": "mixlora", "switch": "mixlora-switch"}

    method: Literal["mixlora"] = "mixlora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Mixture of LoRA experts in the FFN blocks."""
    num_experts: ExpertCount = 8
    """Experts in each FFN block."""
    top_k: int = Field(default=2, ge=1, validate_default=True)
    """Experts that each token uses."""
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

    @field_validator("top_k")
    @classmethod
    def _check_top_k(cls, top_k: int, info: CheckInfo) -> int:
        num_experts = info.data.get("num_experts", top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k must be in [1, num_experts={num_experts}], got {top_k}")
        return top_k

    @model_validator(mode="after")
    def _check_shared_expert(self) -> MixLoraConfig:
        if self.shared_expert is not None and self.weight_decomposition:
            raise ValueError(
                "shared_expert can't be used with weight_decomposition, whose norms are of one "
                "update alone; leave one of them out"
            )
        return self

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
    def title(self) -> str:
        """MixLoRA or MixDoRA."""
        return f"Mix{super().title}"

    @property
    def experts_per_token(self) -> int:
        """See AdapterConfig."""
        return self.top_k

    @property
    def experts_per_router(self) -> int:
        """See AdapterConfig."""
        return self.num_experts

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
        experts = {"rank": rank, "alpha": float(rank)}
        settings = super().combined(others, targets).model_dump()
        return type(self).model_validate({**settings, "experts": experts})

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        expert, shared = self.expert_config, self.shared_config
        lines = [
            *super().card_lines(),
            f"{self.num_experts} experts in each FFN, {self.top_k} for each token",
            f"experts: rank {expert.rank}, alpha {expert.alpha:g}, dropout {expert.dropout:g}",
        ]
        if shared is not None:
            lines.append(f"shared expert: rank {shared.rank}, alpha {shared.alpha:g}")
        return lines

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        expert, shared = self.expert_config, self.shared_config
        summary = super().summary() | {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "experts' rank": expert.rank,
            "experts' scaling": expert.scaling,
        }
        if shared is not None:
            summary |= {"shared rank": shared.rank, "shared scaling": shared.scaling}
        return summary

    def description(self) -> dict[str, Any]:
        """See AdapterConfig."""
        own = self.expert_config.model_dump(include={"rank", "alpha", "dropout"})
        sizes = {"num_experts": self.num_experts, "top_k": self.top_k}
        return super().description() | {"experts": sizes | own}

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        from loraloom.adapters.mixlora.files import reference_fields

        return reference_fields(self, base)

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        from loraloom.adapters.mixlora.files import settings_of

        return settings_of(files, projections)
