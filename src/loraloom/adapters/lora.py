"""LoRA, rsLoRA and DoRA: a low-rank update on each adapted projection."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from loraloom.adapters.contract import MAX_NUMBER, MAX_RANK, AdapterConfig, Adjustable, Projection
from loraloom.adapters.lora_projection import LoraProjection, StackedLoraProjection
from loraloom.adapters.low_rank import DecomposedConfig
from loraloom.adapters.tensor_names import TensorKey
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.base.targets import Pattern, matches, name_targets, names_layers
from loraloom.errors import AdapterError

_Index = Annotated[int, Field(ge=0)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
_Alpha = Annotated[float, Field(gt=0, le=MAX_NUMBER)]
_Value = TypeVar("_Value")

# Settings on a base model's experts where each of them has factors of its own.
ALL_EXPERTS: dict[str, Any] = {"shared_outer": False, "base_experts": None}


class LoraConfig(DecomposedConfig):
    """Low-rank adaptation: y = Wx + b + s·B(A(dropout(x))).

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353;
    Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
    """

    peft_type = "LORA"
    layout = "peft"
    adapts_stacks = True
    formula = "y = Wx + b + s·B(Ax)"
    aliases: ClassVar = {
        "dora": "method: lora with weight_decomposition: true",
        "rslora": "method: lora with rank_stabilized: true",
        "lora+": "method: lora and train.loraplus_lr_ratio",
        "loraplus": "method: lora and train.loraplus_lr_ratio",
    }

    method: Literal["lora"] = "lora"
    """Low-rank adaptation of linear layers."""
    layers: Adjustable[tuple[_Index, ...] | None] = Field(default=None, min_length=1)
    """Decoder layers to adapt, counted from 0; null: all."""
    rank_pattern: dict[Pattern, _Rank] = Field(default_factory=dict)
    """Other ranks, by regular expressions of which the first counts that matches the end of
    `layers.{layer}.{block}.{projection}`, as in PEFT."""
    alpha_pattern: dict[Pattern, _Alpha] = Field(default_factory=dict)
    """Other alphas, by the same kind of expressions."""

    expert_rank: Adjustable[_Rank | None] = None
    """Rank on the experts of a base model, in the scaling of `rank`; null: `rank` divided by the
    number of experts that compute a token, so that a token passes as many ranks as elsewhere."""
    shared_outer: bool = False
    """Share, among the experts of a base model, A of the input projection and B of the output
    projection, which are next to the hidden states that all experts read and write."""
    base_experts: tuple[_Index, ...] | dict[_Index, tuple[_Index, ...]] | None = Field(
        default=None, min_length=1
    )
    """Experts of the base model to adapt, counted from 0, in all layers or by layer; null: all. See
    `loraloom init --expert-share`."""

    def at(self, key: str) -> LoraConfig:
        """Return the settings of one projection, `layers.{layer}.{block}.{projection}`."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        values = {
            "rank": pattern_value(self.rank_pattern, key, self.rank),
            "alpha": pattern_value(self.alpha_pattern, key, self.alpha),
        }
        return self.model_copy(update=values | {"rank_pattern": {}, "alpha_pattern": {}})

    def scaling_of(self, key: TensorKey) -> float:
        """The factor of an update, whose B and A are at a place."""
        return self.at(key.place).scaling

    def fitted(self, base_layers: Sequence[BaseLayer]) -> LoraConfig:
        """Write the rank on a base model's experts into the patterns, as files say it."""
        keys = self.targeted_keys(base_layers)
        ranks = dict(self.rank_pattern)
        alphas = dict(self.alpha_pattern)
        for base_layer in base_layers:
            for block in base_layer.blocks:
                if block.num_experts is None:
                    continue
                divided = max(1, self.rank // (block.experts_per_token or 1))
                rank = self.expert_rank or divided
                factor = rank / self.rank
                if self.rank_stabilized:
                    factor = factor**0.5
                # A projection whose rank the settings name keeps it, and its alpha.
                names = [
                    name
                    for name in block.names_of(keys)
                    if not any(matches(p, block.projections[name].key) for p in self.rank_pattern)
                ]
                if not names or rank == self.rank:
                    continue
                pattern = _pattern_of(block, names, self.rank_pattern)
                ranks[pattern] = rank
                alphas[pattern] = self.alpha * factor
        return self.model_copy(update={"rank_pattern": ranks, "alpha_pattern": alphas})

    def may_adapt(self, block: Block) -> bool:
        if self.layers is not None and block.layer not in self.layers:
            return False
        return block.num_experts is None or self.experts_in(block) != ()

    def with_targets(self, keys: Set[str], base_layers: Sequence[BaseLayer]) -> LoraConfig:
        """Name `layers` where words then say the rest; else the projections of each layer."""
        of_all_layers = self.model_copy(update={"layers": None})
        layers_to_adapt = of_all_layers.layers_to_adapt(base_layers)
        names = name_targets(keys, layers_to_adapt)
        layers = None
        if names_layers(names):
            indices = tuple(
                layer.index
                for layer in base_layers
                if any(base.key in keys for base in layer.projections)
            )
            in_layers = name_targets(keys, [layers_to_adapt[index] for index in indices])
            if not names_layers(in_layers):
                names = in_layers
                layers = indices
        return self.model_copy(update={"target_modules": names, "layers": layers})

    def experts_in(self, block: Block) -> tuple[int, ...] | None:
        """The adapted experts of a base model's block, in order; None: all."""
        experts = self.base_experts
        if isinstance(experts, dict):
            experts = experts.get(block.layer, ())
        return None if experts is None else tuple(sorted(set(experts)))

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        by_layer = self.base_experts if isinstance(self.base_experts, dict) else {}
        for name, layers in (("layers", self.layers or ()), ("base_experts", by_layer)):
            for layer in layers:
                if layer >= len(base_layers):
                    raise AdapterError(
                        f"{name} must name layers in [0, {len(base_layers)}), got {layer}"
                    )
        super().check_fits(base_layers)
        adapted = self.adapted(base_layers)
        if self.shared_outer and all(base.num_experts is None for base in adapted):
            raise AdapterError(
                "shared_outer requires target_modules on a base model's experts, such as `experts`"
            )
        if self.base_experts is not None:
            self._check_experts(base_layers)
        keys = [base.key for base in adapted]
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(matches(pattern, key) for key in keys):
                raise AdapterError(
                    "rank_pattern and alpha_pattern must match adapted projections, such as "
                    f"{keys[0]}, got {pattern}"
                )

    def _check_experts(self, base_layers: Sequence[BaseLayer]) -> None:
        blocks = [block for layer in base_layers for block in layer.blocks]
        keys = self.targeted_keys(base_layers)
        adapted = [b for b in blocks if b.num_experts is not None and b.names_of(keys)]
        if not adapted:
            raise AdapterError(
                "base_experts requires target_modules on a base model's experts, such as `experts`"
            )
        for block in adapted:
            last = max(self.experts_in(block) or (0,))
            if last >= (block.num_experts or 0):
                raise AdapterError(
                    f"base_experts must be in [0, {block.num_experts}) in layer {block.layer}, "
                    f"got {last}"
                )

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        config = self.at(base.key)
        if base.num_experts is None:
            return LoraProjection(base, config, None, dtype, seed)
        stacked = StackedLoraProjection(base, config, None, dtype, seed)
        experts = self.experts_in(block)
        if experts is not None and len(experts) < base.num_experts:
            stacked.keep(experts)
        if self.shared_outer:
            stacked.share("lora_B" if base is block.output else "lora_A")
        return stacked


def _pattern_of(block: Block, names: Sequence[str], named: Mapping[str, int]) -> str:
    """Match projections of a block of experts, in all layers where no pattern names some."""
    if not named:
        return rf"{re.escape(block.path)}\.\w+"
    projections = "|".join(map(re.escape, names))
    return rf"layers\.{block.layer}\.{re.escape(block.path)}\.({projections})"


def with_all_experts(
    config: AdapterConfig, tensors: Mapping[str, Tensor], base_layers: Sequence[BaseLayer]
) -> tuple[Any, dict[str, Tensor]]:
    """Give each expert factors: those that all share, or zeros where it has no LoRA."""
    if not isinstance(config, LoraConfig):
        return config, dict(tensors)
    blocks = {f"layers.{b.layer}.{b.path}": b for layer in base_layers for b in layer.blocks}
    expanded = dict(tensors)
    for name, tensor in tensors.items():
        key = TensorKey.parse(name)
        block = None if key is None else blocks[key.place.rpartition(".")[0]]
        if block is not None and block.num_experts is not None:
            of_all = tensor.new_zeros(block.num_experts, *tensor.shape[1:])
            experts = config.experts_in(block)
            of_all[slice(None) if experts is None else list(experts)] = tensor
            expanded[name] = of_all
    return config.model_copy(update=ALL_EXPERTS), expanded


def pattern_value(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """Return the value of the first pattern that matches a module's name."""
    for pattern, value in patterns.items():
        if matches(pattern, name):
            return value
    return default
