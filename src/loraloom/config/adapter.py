"""What an adapter is: the `adapter:` section of a job, and the argument of `Host.add`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from loraloom.config.fields import CheckInfo, StrictModel

TargetGroup = Literal["all-linear", "attention", "ffn"]


def _is_module_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name not in get_args(TargetGroup)


class ExpertsConfig(StrictModel):
    """The experts' settings where they differ from the attention LoRA's; None takes those."""

    rank: int | None = Field(default=None, ge=1)
    """Rank of each expert."""
    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the experts' scaling."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on the experts' inputs, in training only."""


class LoraConfig(StrictModel):
    """Low-rank adaptation: y = Wx + b + s·B(A(dropout(x))).

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353;
    Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
    """

    method: Literal["lora"] = "lora"
    """Low-rank adaptation of linear layers."""
    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scaling s = alpha / rank (alpha / sqrt(rank) when rank_stabilized)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update, in training only."""
    target_modules: TargetGroup | tuple[str, ...] = "all-linear"
    """Projections to adapt: their names, or `all-linear`, `attention`, `ffn`."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank), as rsLoRA does."""
    weight_decomposition: bool = False
    """Train the norm of each output row apart from its direction: DoRA, or MixDoRA in a mixture."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Start of A: Kaiming uniform with a = sqrt(5), or normal with std 1 / rank. B starts at 0."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, targets: Any) -> Any:
        groups = get_args(TargetGroup)
        is_list = isinstance(targets, list | tuple)
        if targets in groups or (is_list and targets and all(_is_module_name(t) for t in targets)):
            return targets
        raise ValueError(
            f"target_modules must be {', '.join(groups)} or a list of module names, got {targets!r}"
        )

    @property
    def scaling(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class MixLoraConfig(LoraConfig):
    """A router and several LoRA experts in each FFN block, plain LoRA on attention.

    Source: Li et al. 2024, MixLoRA, arXiv:2404.15159.
    """

    method: Literal["mixlora"] = "mixlora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Mixture of LoRA experts in the FFN blocks."""
    num_experts: int = Field(default=8, ge=1)
    """Experts in each FFN block."""
    top_k: int = Field(default=2, ge=1, validate_default=True)
    """Experts that each token uses."""
    experts: ExpertsConfig | None = None
    """The experts' own rank, alpha and dropout where they differ."""
    router_init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the router's initial weights."""
    router_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiply the router's input by noise in [1 - jitter, 1 + jitter], in training only."""
    router_aux_loss_coef: float = Field(default=0.01, ge=0)
    """Weight of the load-balance loss; its minimum is coefficient × top_k."""
    router_z_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the mean squared logsumexp of the router's logits."""
    router_loss_scope: Literal["pooled", "per_layer"] = "pooled"
    """Load over all layers together, as the reference has it, or the mean of the layers' losses."""

    @field_validator("target_modules")
    @classmethod
    def _check_ffn_is_targeted(
        cls, targets: TargetGroup | tuple[str, ...]
    ) -> TargetGroup | tuple[str, ...]:
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

    @property
    def expert_config(self) -> LoraConfig:
        """The experts as a plain LoRA's configuration, with what they inherit filled in."""
        own = {} if self.experts is None else self.experts.model_dump(exclude_none=True)
        shared = {name: getattr(self, name) for name in LoraConfig.model_fields if name != "method"}
        return LoraConfig(**{**shared, **own})


AdapterConfig = Annotated[LoraConfig | MixLoraConfig, Field(discriminator="method")]
