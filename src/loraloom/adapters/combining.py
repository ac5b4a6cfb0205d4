"""Adapters put into the base model's weights, and several adapters' weights as one adapter's."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraloom.adapters.contract import Adapter, AdapterConfig, Projection
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.weighted_sum import concatenate
from loraloom.base.blocks import BaseProjection
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


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Write the weighted sum of LoRAs down as one LoRA."""
    if not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"weights must be a finite number for each of the adapters, at least one, "
            f"got {list(weights)} for {len(adapters)}"
        )
    for adapter in adapters:
        if adapter.adapts_stacks:
            raise AdapterError(
                f"adapter {adapter.name!r} has updates of stacked experts, which cannot be "
                "combined; choose it for each row: (name, scale)"
            )
    return concatenate([(adapter.config, adapter.tensors()) for adapter in adapters], weights)
