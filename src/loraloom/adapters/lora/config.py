"""Settings of LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from loraloom.adapters.config import MAX_NUMBER, MAX_RANK, AdapterConfig, LowRankConfig, Targets
from loraloom.adapters.keys import Shape, TensorKey, is_meant, target_projections
from loraloom.adapters.lora.files import peft_fields, settings_of
from loraloom.adapters.lora.selection import (
    check_selection,
    is_pattern,
    pattern_value,
    projection_keys,
)
from loraloom.config.fields import StrictModel
from loraloom.errors import AdapterError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles

PEFT_STARTS = ("orthogonal", "pissa", "olora")
"""Initialisations that PEFT computes."""

_Index = Annotated[int, Field(ge=0)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=MAX_NUMBER)]


class DecomposedConfig(LowRankConfig):
    """A LoRA on each projection, or a DoRA: what plain adapters and experts have in common."""

    weight_decomposition: bool = False
    """Train the norm of each output row apart from its direction: DoRA, or MixDoRA in a mixture."""

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """LoRA or DoRA."""
        return "DoRA" if self.weight_decomposition else "LoRA"

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        yield replace(place, part="lora_A"), (self.rank, in_features)
        yield replace(place, part="lora_B"), (out_features, self.rank)
        if self.weight_decomposition:
            yield replace(place, part="magnitude"), (out_features,)


class EvaConfig(StrictModel):
    """How `init: eva` looks at the data; the names and defaults are PEFT's."""

    rho: float = Field(default=2.0, ge=1, le=MAX_NUMBER)
    """Ranks move between projections, to at most rho × rank; 1: all keep the adapter's rank."""
    tau: float = Field(default=0.99, ge=0, le=1)
    """Directions are taken once their cosine similarity to those of a batch before reaches this."""
    use_label_mask: bool = True
    """Look at the tokens that are learnt alone."""
    whiten: bool = False
    """Divide directions by the roots of their singular values."""
    adjust_scaling_factors: bool = True
    """Keep alpha / rank where a projection's rank has changed."""


class LoraConfig(DecomposedConfig):
    """Low-rank adaptation: y = Wx + b + s·B(A(dropout(x))).

    A name in `target_modules` may be the end of `layers.{layer}.{block}.{projection}`, which then
    adapts that projection alone.

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353;
    Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
    """

    peft_type = "LORA"
    layout = "peft"
    formula = "y = Wx + b + s·B(Ax)"
    aliases: ClassVar = {
        "dora": "method: lora with weight_decomposition: true",
        "rslora": "method: lora with rank_stabilized: true",
        "lora+": "method: lora and train.loraplus_lr_ratio",
        "loraplus": "method: lora and train.loraplus_lr_ratio",
    }

    method: Literal["lora"] = "lora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Low-rank adaptation of linear layers."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "kaiming"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Start: A Kaiming uniform with a = sqrt(5) or normal with std 1 / rank, and B zero; A and B
    random with BA = 0 (orthogonal, even ranks); the largest part of W by its singular values
    (pissa) or QR (olora), which is then taken off W; or A the main directions of the projection's
    inputs on the training data (eva). The last four are computed by PEFT."""
    eva: EvaConfig = EvaConfig()
    """How init: eva looks at the data."""
    layers: tuple[_Index, ...] | None = Field(default=None, min_length=1)
    """Decoder layers to adapt, counted from 0; None: all."""
    rank_pattern: dict[str, _Rank] = Field(default_factory=dict)
    """Other ranks, by regular expressions of which the first counts that matches the end of
    `layers.{layer}.{block}.{projection}`, as in PEFT."""
    alpha_pattern: dict[str, _Alpha] = Field(default_factory=dict)
    """Other alphas, by the same kind of expressions."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        odd = [pattern for pattern in patterns if not is_pattern(pattern)]
        if odd:
            raise ValueError(f"patterns must be regular expressions, got {shown(odd[0])}")
        return patterns

    @model_validator(mode="after")
    def _check_ranks(self) -> LoraConfig:
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"rank must be even for init: orthogonal, got {odd[0]}")
        if self.init != "eva" and self.eva != EvaConfig():
            raise ValueError(f"eva is a setting of init: eva, got init: {self.init}")
        return self

    @property
    def takes_start_off(self) -> bool:
        """See AdapterConfig."""
        return self.init in ("pissa", "olora")

    @property
    def starts_from_data(self) -> bool:
        """See AdapterConfig."""
        return self.init == "eva"

    def started(
        self, model: Any, batches: Sequence[Mapping[str, Tensor]], base: BaseInfo
    ) -> tuple[AdapterConfig, dict[str, Tensor]]:
        """See AdapterConfig; ranks move to where inputs vary in more directions."""
        from loraloom.adapters.lora.eva import eva_start

        return eva_start(self, model, batches, base)

    @property
    def in_every_layer(self) -> bool:
        """See AdapterConfig."""
        return self.layers is None and not self._names_layers

    @property
    def _names_layers(self) -> bool:
        targets = self.target_modules
        return not isinstance(targets, str) and any("." in target for target in targets)

    def at(self, key: str) -> LoraConfig:
        """Return the settings of one projection, `layers.{layer}.{block}.{projection}`."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        own = {
            "rank": pattern_value(self.rank_pattern, key, self.rank),
            "alpha": pattern_value(self.alpha_pattern, key, self.alpha),
        }
        return self.model_copy(update=own | {"rank_pattern": {}, "alpha_pattern": {}})

    def scaling_of(self, key: TensorKey) -> float:
        """See AdapterConfig."""
        return self.at(f"layers.{key.layer}.{key.path}").scaling

    def combined(self, others: Sequence[AdapterConfig], targets: Targets) -> AdapterConfig:
        """See AdapterConfig; targets say the layers."""
        for config in (self, *others):
            if isinstance(config, LoraConfig) and (config.takes_start_off or config.rank_pattern):
                raise AdapterError(
                    "adapters that are combined must have one rank and leave the base's weights "
                    "as they are, got a rank_pattern or init: pissa or olora; give their rows "
                    "scales instead"
                )
        plain = {"layers": None, "alpha_pattern": {}, "init": "kaiming", "eva": EvaConfig()}
        return super(LoraConfig, self.model_copy(update=plain)).combined(others, targets)

    def targets_in(self, layer: BaseLayer) -> frozenset[str]:
        """See AdapterConfig."""
        if self.layers is not None and layer.index not in self.layers:
            return frozenset()
        if isinstance(self.target_modules, str):
            return super().targets_in(layer)
        return frozenset(
            key.rpartition(".")[2]
            for key in projection_keys(layer)
            if any(is_meant(target, key) for target in self.target_modules)
        )

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.lora.start import start_of
        from loraloom.adapters.lora.weights import LoraProjection
        from loraloom.adapters.low_rank import LowRankAdapter

        check_selection(self, base_layers)

        def build(projection, layer):
            own = self.at(projection.key)
            weights = LoraProjection(projection, own, None, dtype, seed)
            if own.init in PEFT_STARTS:
                weights.start_from(*start_of(projection, own, seed), off=own.takes_start_off)
            return weights

        return LowRankAdapter.of(name, self, base_layers, build)

    def layer_shapes(self, base: BaseInfo, layer: int) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        if self.layers is not None and layer not in self.layers:
            return
        for path in target_projections(self.target_modules, base, layer):
            block, _, projection = path.partition(".")
            place = TensorKey(layer, block, "", projection)
            own = self.at(f"layers.{layer}.{path}")
            yield from own.projection_shapes(place, *base.shapes[path])

    def known_targets(self, base: BaseInfo) -> Targets:
        """See AdapterConfig; names with a layer stay as they are."""
        return self.target_modules if self._names_layers else super().known_targets(base)

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        lines = [
            f"{label}: {', '.join(f'{key} {value:g}' for key, value in patterns.items())}"
            for label, patterns in (("ranks", self.rank_pattern), ("alphas", self.alpha_pattern))
            if patterns
        ]
        if self.layers is not None:
            lines.append(f"layers {', '.join(map(str, self.layers))}")
        return [*super().card_lines(), *lines]

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        chosen = {"layers": self.layers, "ranks": self.rank_pattern}
        own = {name: value for name, value in chosen.items() if value}
        start = self.init if self.takes_start_off else None
        return super().summary() | own | {"alphas": self.alpha_pattern, "init": start}

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        return peft_fields(self, base)

    def reference_fault(self, base: BaseInfo) -> str | None:
        """See AdapterConfig."""
        from loraloom.adapters.reference import lora_fault

        chosen = {"layers": self.layers, "rank_pattern": self.rank_pattern}
        chosen |= {"alpha_pattern": self.alpha_pattern, "places in target_modules": None}
        if self._names_layers:
            chosen["places in target_modules"] = self.target_modules
        if self.takes_start_off:
            chosen[f"init: {self.init}"] = self.init
        names = [name for name, value in chosen.items() if value]
        if names:
            return f"MoE-PEFT has no {', '.join(names)}"
        return lora_fault(self, base)

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        return settings_of(files, projections)
