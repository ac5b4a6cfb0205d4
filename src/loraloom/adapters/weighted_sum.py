"""Weighted sums of adapters, made for the rows that ask for them.

Axes: T tokens, I in_features, O out_features, P columns of the A product, S rows of B, E experts of
a base model whose weights are one tensor.

With weights w, an adapted projection computes, for LoRAs as PEFT's several active adapters do:

    y = Wx + b + Σ_i w_i ((c_i - 1) ∘ Wx + c_i ∘ between_i(A_i x) B_i)

where c_i is DoRA's factor, or 1. That is one adapter whose A and B are those of all, behind one
another: its factor is c = 1 + Σ_i w_i (c_i - 1), and B_i becomes w_i c_i / c ∘ B_i. On the experts
of a base model, each has its own: [E, S, I], [E, S, O] and [E, O].
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Adapter, Projection
from loraloom.adapters.lora_projection import StackedLoraProjection
from loraloom.adapters.low_rank import LowRankAdapter
from loraloom.adapters.segment import SegmentTokens
from loraloom.base.blocks import BaseLayer
from loraloom.errors import AdapterError, shown

# Adapters, by name, and the factors of what they add.
Weighted = tuple[tuple[str, float], ...]

MAX_MEMBERS = 16
MAX_WEIGHT = 1e6


def is_sum(name: str) -> bool:
    """Whether a name, in which no adapter's own has these signs, is of a sum."""
    return "+" in name or ":" in name


def parse_sum(text: str) -> Weighted:
    """Read `law:0.7+math:0.3`; a weight that is left out is 1."""
    weights: dict[str, float] = {}
    terms = text.split("+")
    for term in terms:
        name, colon, number = term.partition(":")
        try:
            weights[name] = float(number) if colon else 1.0
        except ValueError:
            weights[name] = math.nan
    is_finite = all(abs(weight) <= MAX_WEIGHT for weight in weights.values())
    is_unique = len(weights) == len(terms)
    if "" in weights or not is_finite or not is_unique or len(terms) > MAX_MEMBERS:
        raise AdapterError(
            "a sum of adapters must be written as law:0.7+math:0.3, of 1 to "
            f"{MAX_MEMBERS} different ones with finite weights, got {shown(text)}"
        )
    return tuple(weights.items())


def write_sum(weighted: Sequence[tuple[str, float]]) -> str:
    """Name a sum, `law:0.7+math:0.3`."""
    return "+".join(f"{name}:{float(weight)!r}" for name, weight in weighted)


class WeightedSum(LowRankAdapter):
    """Several adapters' updates, added up; it has no weights of its own, and isn't trained."""

    def __init__(self, name: str, members: Sequence[Adapter], weights: Sequence[float]):
        for member in members:
            check_adds_up(member)
        first = members[0]
        config = first.config.model_copy(update={"dropout": 0.0})
        layers = sum_blocks(first.base_layers, members, weights, SumProjection)
        super().__init__(name, config, first.base_layers, layers)
        self.added = nn.ModuleList(members)
        self.members = dict(zip(name.split("+"), members, strict=True))
        self.is_trained = False

    def stack_key(self) -> Hashable:
        return (WeightedSum, *(type(adapter.config) for adapter in self.parts), self._shapes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the members' tensors, behind each one's name and weight in the sum."""
        tensors: dict[str, Tensor] = {}
        for term, member in self.members.items():
            for name, tensor in member.tensors().items():
                tensors[f"{term}.{name}"] = tensor
        return tensors


class SumProjection(Projection):
    """What several adapters have on a projection, each with a weight."""

    kept = None  # on a base model's experts, all have factors

    def __init__(self, updates: Sequence[tuple[Projection, float]]):
        super().__init__(updates[0][0].base)
        # Tuples, which torch doesn't look into: the members have these weights.
        self.updates = tuple(update for update, _ in updates)
        self.weights = tuple(weight for _, weight in updates)
        self._num_columns = [update.num_columns for update in self.updates]

    @property
    def maps_rank_space(self) -> bool:
        return any(update.maps_rank_space for update in self.updates)

    @property
    def num_columns(self) -> int:
        return sum(self._num_columns)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        matrices = [update.compute_A(dtype) for update in self.updates]
        return torch.cat(self._by_expert(matrices), -2)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        scales = self._scales()
        factor = self._combine_scales(scales)
        wide = torch.promote_types(dtype, torch.float32)
        matrices = self._by_expert([update.compute_B(wide) for update in self.updates])
        weighted = list[Tensor]()
        for lora_B, weight, scale in zip(matrices, self.weights, scales, strict=True):
            strength: Any = weight if scale is None else weight * scale
            if factor is not None:
                strength = strength / factor
            weighted.append((lora_B * strength).to(dtype))
        return torch.cat(weighted, -2)

    def row_scale(self) -> Tensor | None:
        factor = self._combine_scales(self._scales())
        return None if factor is None else factor.flatten(0, -2)

    def _by_expert(self, matrices: list[Tensor]) -> list[Tensor]:
        """On a base model's experts, give each its matrices, unless all share all of them."""
        stacks = [update for update in self.updates if isinstance(update, StackedLoraProjection)]
        is_shared = all(len(matrix) == 1 for matrix in matrices)
        if not stacks or (is_shared and all(stack.kept is None for stack in stacks)):
            return matrices
        pairs = zip(stacks, matrices, strict=True)
        return [stack.of_each_expert(matrix) for stack, matrix in pairs]

    def _scales(self) -> list[Tensor | None]:
        """The updates' factors c in B's axes, [1, O], or [E, 1, O] of a base model's experts."""
        scales = list[Tensor | None]()
        for update in self.updates:
            scale = update.row_scale()
            if scale is not None and isinstance(update, StackedLoraProjection):
                scale = update.of_each_expert(scale, blank=1.0).unsqueeze(1)
            scales.append(scale)
        return scales

    def _combine_scales(self, scales: Sequence[Tensor | None]) -> Tensor | None:
        excess = [
            weight * (scale - 1)
            for weight, scale in zip(self.weights, scales, strict=True)
            if scale is not None
        ]
        if not excess:
            return None
        factor = 1 + torch.stack(excess).sum(0)
        # Updates are divided by it, and rounded; see scale_update.
        dtype: Any = torch.bfloat16
        if self.base.quantized is None:
            dtype = self.base.stored.dtype
        least = torch.finfo(dtype).eps ** 0.5
        return torch.where(factor.abs() < least, least, factor)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        return torch.cat(self.mapped(low_rank, hidden_states, tokens), 1)

    def mapped(
        self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens
    ) -> list[Tensor]:
        """Compute what each update's B multiplies, [T, S]."""
        columns = low_rank.split(self._num_columns, 1)
        return [
            update.between(columns_of_update, hidden_states, tokens)
            for update, columns_of_update in zip(self.updates, columns, strict=True)
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()


def sum_blocks(
    base_layers: Sequence[BaseLayer],
    members: Sequence[Adapter],
    weights: Sequence[float],
    make: Callable[[Sequence[tuple[Projection, float]]], Projection],
) -> list[nn.ModuleDict]:
    """Make one of what adapters have on each projection, by the names of block and projection."""
    layers = list[nn.ModuleDict]()
    for base in base_layers:
        blocks = nn.ModuleDict()
        for block in base.blocks:
            updates = defaultdict[str, list[tuple[Projection, float]]](list)
            for member, weight in zip(members, weights, strict=True):
                for name, projection in member.weights_on(block).items():
                    updates[name].append((projection, weight))
            projections = {name: make(pairs) for name, pairs in updates.items()}
            blocks[block.module_name] = nn.ModuleDict(projections)
        layers.append(blocks)
    return layers


def check_adds_up(member: Adapter) -> None:
    computes = isinstance(member, LowRankAdapter) and member.is_as_in(
        LowRankAdapter, "ffn", "ffn_weights", "group_low_rank"
    )
    if len(member.own_modules):
        obstacle = "extra trainable modules"
    elif member.config.experts_per_router:
        obstacle = "experts"
    elif not computes:
        obstacle = "a separate FFN block"
    else:
        return
    hint = "scale it alone: (name, scale)"
    if member.members:
        names = ", ".join(f"{member.name}/{name}" for name in member.members)
        hint = f"use its experts, {names}"
    raise AdapterError(
        "a sum supports adapters without routers and extra trainable modules, got "
        f"{member.name!r} ({member.config.title}) with {obstacle}; {hint}"
    )
