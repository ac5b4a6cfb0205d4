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

    @property
    def is_scaled(self) -> bool:
        return self.row_scale is not None

    def flat(self) -> ExpertSide:
        row_scale = None if self.row_scale is None else self.row_scale.flatten(0, 1)
        return ExpertSide(self.A.flatten(0, 1), self.B.flatten(0, 1), row_scale)

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

    @property
    def sides(self) -> list[ExpertSide]:
        return [side for side in (self.up, self.down) if side is not None]

    def scaled(self, scale: float) -> ExpertWeights:
        if scale == 1:
            return self
        up = None if self.up is None else self.up.scaled(scale)
        down = None if self.down is None else self.down.scaled(scale)
        return replace(self, up=up, down=down)

    def flat(self) -> ExpertWeights:
        """See a stack of adapters' weights as one adapter's with as many more groups."""
        up = None if self.up is None else self.up.flat()
        down = None if self.down is None else self.down.flat()
        return replace(self, up=up, down=down)


def stack_experts(weights: Sequence[ExpertWeights]) -> ExpertWeights:
    """Put like adapters' weights side by side, [N, G, …]."""
    first = weights[0]
    up = None if first.up is None else _stack_sides([each.up for each in weights])
    down = None if first.down is None else _stack_sides([each.down for each in weights])
    places = None
    if first.places is not None:
        places = torch.stack([each.places for each in weights])  # ty: ignore[invalid-argument-type]
    return replace(first, up=up, down=down, places=places)


def _stack_sides(sides: Sequence[Any]) -> ExpertSide:
    row_scale = None
    if sides[0].row_scale is not None:
        row_scale = torch.stack([side.row_scale for side in sides])
    lora_A = torch.stack([side.A for side in sides])
    return ExpertSide(lora_A, torch.stack([side.B for side in sides]), row_scale)
