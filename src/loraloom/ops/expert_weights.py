"""An adapter's weights on the experts of a base model, in compute form.

Axes: N adapters, E experts of the base, M LoRA experts in each, G = M·E groups of weights,
I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loraloom.ops.low_rank import scale_update
from loraloom.ops.stacked import StackedWeights


@dataclass(frozen=True)
class ExpertSide(StackedWeights):
    """An adapter's update of a stacked projection, in compute form."""

    A: Tensor  # [G, R, I], or [M, R, I] where all base experts share it
    B: Tensor  # scaled, [G, R, O] or [M, R, O]
    row_scale: Tensor | None = None  # DoRA's c, [G, O] float32

    stacked_fields = ("A", "B", "row_scale")

    def scaled(self, scale: float) -> ExpertSide:
        lora_B = self.B
        if self.row_scale is not None:  # each expert's own, which a shared B gets too
            lora_B = lora_B.expand(len(self.row_scale), -1, -1)
        scaled, row_scale = scale_update(lora_B.flatten(0, 1), self.row_scale, scale)
        return replace(self, B=scaled.view_as(lora_B), row_scale=row_scale)


@dataclass(frozen=True)
class ExpertWeights(StackedWeights):
    """An adapter's weights in a block of stacked experts; None where nothing is adapted."""

    up: ExpertSide | None
    down: ExpertSide | None
    num_choices: int = 1  # M
    # Where the factors of each of the base's experts are, [E], if not all have any; -1: nowhere.
    places: Tensor | None = None
    num_adapted: int | None = None  # of the base's experts; None: all

    stacked_fields = ("up", "down", "places")

    def scaled(self, scale: float) -> ExpertWeights:
        if scale == 1:
            return self
        up = None if self.up is None else self.up.scaled(scale)
        down = None if self.down is None else self.down.scaled(scale)
        return replace(self, up=up, down=down)

    def flat(self) -> ExpertWeights:
        """See a stack of adapters' weights as one adapter's with as many more groups."""
        return self.map_fields(lambda tensor: tensor.flatten(0, 1))


def stack_alike(parts: Sequence[Any]) -> Any:
    """Put like adapters' weights side by side, [N, G, …]."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.stack(list(parts))
    stacked = {}
    for name in first.stacked_fields:
        stacked[name] = stack_alike([getattr(part, name) for part in parts])
    return replace(first, **stacked)
