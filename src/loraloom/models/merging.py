"""An adapter's updates put into the base model's weights, and the weights put back.

Axes: O out_features, I in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.base import BaseProjection
from loraloom.adapters.method import Adapter, Projection
from loraloom.adapters.own import refuse_own_parts
from loraloom.errors import AdapterError


@dataclass(frozen=True)
class MergeError:
    """What rounding to the base model's dtype changed, over all merged weights.

    Args:
        of_weights: ‖rounded - exact‖ / ‖exact‖.
        of_update: ‖rounded - exact‖ / ‖exact - base‖: the share of the update that is lost.
    """

    of_weights: float
    of_update: float


class Merged:
    """An adapter that is in the base model's weights."""

    def __init__(self, adapter: Adapter):
        refuse_own_parts(adapter.config, f"adapter {adapter.name!r}", "be merged into a base model")
        check_merges(adapter)
        self.name = adapter.name
        projections = list(adapter.projections())
        for projection in projections:
            projection.base.check_can_be_changed()
        self._originals: list[tuple[BaseProjection, Tensor]] = []
        try:
            self.error = self._merge(projections)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put the original weights back, bit by bit."""
        for base, original in self._originals:
            base.set_weight(original)
        self._originals.clear()

    def _merge(self, projections: list[Projection]) -> MergeError:
        lost = exact = changed = 0.0
        for projection in projections:
            base = projection.base
            wide = torch.float32 if base.device.type == "mps" else torch.float64
            merged, original = projection.merged(wide), base.weight.detach()
            self._originals.append((base, original.to("cpu", copy=True)))
            lost += _square(merged.to(original.dtype).to(wide) - merged)
            exact += _square(merged)
            changed += _square(merged - original.to(wide))
            base.set_weight(merged)
        return MergeError((lost / exact) ** 0.5, (lost / changed) ** 0.5 if changed else 0.0)


def check_merges(adapter: Adapter) -> None:
    """Raise an AdapterError if no weights stand for an adapter, as its routers choose by token."""
    if adapter.config.experts_per_router:
        raise AdapterError(
            f"adapter {adapter.name!r} must be without routers to be merged into the base model, "
            f"got {adapter.config.title}, whose update depends on the token; `loraloom export` "
            "writes mixtures of whole FFN blocks as MoE checkpoints"
        )


def _square(values: Tensor) -> float:
    return float(values.square().sum())
