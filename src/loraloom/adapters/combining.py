"""Adapters put into the base model's weights, and several adapters' weights as one adapter's."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.contract import Adapter, AdapterConfig, Projection
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.lora import ALL_EXPERTS, LoraConfig, with_all_experts
from loraloom.adapters.tensor_names import TensorKey
from loraloom.base.blocks import BaseLayer, BaseProjection
from loraloom.config.fields import checked
from loraloom.errors import AdapterError, ConfigError


class Merged:
    """An adapter that is in the base model's weights."""

    # `lost` is the share of its update that rounding costs, ‖rounded - exact‖ / ‖exact - base‖.

    def __init__(self, adapter: Adapter):
        refuse_own_parts(adapter.config, f"adapter {adapter.name!r}", "be merged into a base model")
        check_merges(adapter)
        self.name = adapter.name
        projections = list(adapter.projections())
        for projection in projections:
            projection.base.check_can_be_changed()
        self._originals: list[tuple[BaseProjection, Tensor]] = []
        try:
            self.lost = self._merge(projections)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        for base, original in self._originals:
            base.set_weight(original)
        self._originals.clear()

    def _merge(self, projections: list[Projection]) -> float:
        lost = changed = 0.0
        for projection in projections:
            base = projection.base
            wide = torch.float32 if base.device.type == "mps" else torch.float64
            merged = projection.merged(wide)
            original = base.weight.detach()
            self._originals.append((base, original.to("cpu", copy=True)))
            rounded = merged.to(original.dtype).to(wide)
            lost += float((rounded - merged).square().sum())
            changed += float((merged - original.to(wide)).square().sum())
            base.set_weight(merged)
        return (lost / changed) ** 0.5 if changed else 0.0


def check_merges(adapter: Adapter) -> None:
    """Raise an AdapterError if no weights stand for an adapter, as its updates aren't linear."""
    if not adapter.is_mergeable:
        raise AdapterError(
            f"adapter {adapter.name!r} must be without routers to be merged into the base model, "
            f"and with nothing else between A and B, got {adapter.config.title}, whose update "
            "depends on the token; `loraloom export` writes mixtures of whole FFN blocks as MoE "
            "checkpoints"
        )


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Write the weighted sum of LoRAs down as one LoRA, with their A and B behind one another."""
    if not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"weights must be a finite number for each of the adapters, at least one, "
            f"got {list(weights)} for {len(adapters)}"
        )
    configs = [_lora_config(adapter) for adapter in adapters]
    on_experts = _settings_on_experts(adapters)
    matrices = defaultdict[str, list[Tensor]](list)
    for adapter, config, weight in zip(adapters, configs, weights, strict=True):
        tensors = adapter.tensors()
        if on_experts == ALL_EXPERTS:
            _, tensors = with_all_experts(config, tensors, adapter.base_layers)
        for name, tensor in tensors.items():
            key = TensorKey.parse(name)
            assert key is not None  # as all of a LoRA's are
            strength = 1.0
            if key.part == "lora_B":
                strength = weight * config.scaling_of(key)
            wide = torch.promote_types(tensor.dtype, torch.float32)
            matrices[name].append(tensor.to(wide) * strength)
    combined: dict[str, Tensor] = {}
    for name, terms in matrices.items():
        rank_axis = -1 if name.endswith(".lora_B") else -2
        combined[name] = torch.cat(terms, rank_axis)
    settings = configs[0].model_dump(exclude_unset=True) | on_experts
    return _combined_config(settings, combined, adapters[0].base_layers), combined


def _lora_config(adapter: Adapter) -> LoraConfig:
    config = adapter.config
    if type(config) is not LoraConfig or config.weight_decomposition:
        raise AdapterError(f"adapters to combine must be LoRAs, got {config.title}")
    refuse_own_parts(config, "an adapter", "be combined")
    return config


def _settings_on_experts(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return which experts have factors, if that is the same in all LoRAs on experts."""
    settings = []
    for adapter in adapters:
        if adapter.adapts_stacks:
            settings.append({name: getattr(adapter.config, name) for name in ALL_EXPERTS})
    is_same = all(each == settings[0] for each in settings)
    return settings[0] if settings and is_same else ALL_EXPERTS


def _combined_config(
    settings: dict[str, Any], tensors: Mapping[str, Tensor], base_layers: Sequence[BaseLayer]
) -> LoraConfig:
    """Describe a LoRA with these tensors and the scale 1, by the first one's other settings."""
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A"):
            ranks[name.removesuffix(".lora_A")] = tensor.shape[-2]
    rank = max(ranks.values())
    settings |= {"rank": rank, "alpha": float(rank), "rank_stabilized": False}
    settings |= {"rank_pattern": {}, "alpha_pattern": {}, "expert_rank": None}
    config = checked(LoraConfig, settings)
    if config.targeted_keys(base_layers) != ranks.keys():
        config = config.with_targets(ranks.keys(), base_layers)
    adapted = config.adapted(base_layers)
    on_experts = [ranks[base.key] for base in adapted if base.num_experts is not None]
    if on_experts:
        config = config.model_copy(update={"expert_rank": max(on_experts)}).fitted(base_layers)
    others = {key: size for key, size in ranks.items() if size != config.at(key).rank}
    patterns = {re.escape(key): size for key, size in others.items()}
    alphas = {pattern: float(size) for pattern, size in patterns.items()}
    return config.model_copy(
        update={
            "rank_pattern": patterns | config.rank_pattern,
            "alpha_pattern": alphas | config.alpha_pattern,
        }
    )
