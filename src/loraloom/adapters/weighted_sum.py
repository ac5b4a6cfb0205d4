"""Weighted sums of adapters, made for the rows that ask for them.

Axes: T tokens, I in_features, O out_features, P columns of the A product, S rows of B.

With weights w, an adapted projection computes, for LoRAs as PEFT's several active adapters do:

    y = Wx + b + Σ_i w_i ((c_i - 1) ∘ Wx + c_i ∘ between_i(A_i x) B_i)

where c_i is DoRA's factor, or 1. That is one adapter whose A and B are those of all, behind one
another: its factor is c = 1 + Σ_i w_i (c_i - 1), and B_i becomes w_i c_i / c ∘ B_i.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Adapter, AdapterConfig, Projection
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.lora import LoraConfig
from loraloom.adapters.low_rank import LowRankAdapter
from loraloom.adapters.segment import SegmentTokens
from loraloom.adapters.tensor_names import TensorKey
from loraloom.base.blocks import BaseLayer
from loraloom.config.fields import checked
from loraloom.errors import AdapterError, shown

# Adapters, by name, and the factors of what they add.
Weighted = tuple[tuple[str, float], ...]

MAX_MEMBERS, MAX_WEIGHT = 16, 1e6


def is_sum(name: str) -> bool:
    """Whether a name, in which no adapter's own has these signs, is of a sum."""
    return "+" in name or ":" in name


def parse_sum(text: str) -> Weighted:
    """Read `law:0.7+math:0.3`; a weight that is left out is 1."""
    parts = [part.partition(":") for part in text.split("+")]
    try:
        weighted = tuple((name, float(weight) if colon else 1.0) for name, colon, weight in parts)
    except ValueError:
        weighted = ()
    names = {name for name, _ in weighted}
    fits = all(name and abs(weight) <= MAX_WEIGHT for name, weight in weighted)
    if not (fits and 0 < len(names) == len(weighted) <= MAX_MEMBERS):
        raise AdapterError(
            "a sum of adapters must be written as law:0.7+math:0.3, of 1 to "
            f"{MAX_MEMBERS} different ones with finite weights, got {shown(text)}"
        )
    return weighted


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
        Adapter.__init__(self, name, config, first.base_layers, layers)
        self.add_module("shared", None)
        self.members = nn.ModuleList(members)
        self.is_trained = False

    def stack_key(self) -> Hashable:
        return (WeightedSum, *(type(one.config) for one in self.parts), self._shapes)

    @property
    def parts(self) -> Sequence[Adapter]:
        return (self, *self.members)  # pyright: ignore[reportReturnType]

    def tensors(self) -> dict[str, Tensor]:
        """Return the members' tensors, behind each one's name and weight in the sum."""
        parts = zip(self.name.split("+"), self.parts[1:], strict=True)
        return {f"{own}.{name}": t for own, one in parts for name, t in one.tensors().items()}


class SumProjection(Projection):
    """What several adapters have on a projection, each with a weight."""

    def __init__(self, parts: Sequence[tuple[Projection, float]]):
        super().__init__(parts[0][0].base)
        self._parts = tuple(parts)
        stops = list(accumulate((one.num_columns for one, _ in parts), initial=0))
        self._columns = [slice(*span) for span in pairwise(stops)]

    @property
    def maps_rank_space(self) -> bool:
        return any(one.maps_rank_space for one, _ in self._parts)

    @property
    def num_columns(self) -> int:
        return self._columns[-1].stop

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([one.compute_A(dtype) for one, _ in self._parts])

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        factor, matrices = self.row_scale(), list[Tensor]()
        wide = torch.promote_types(dtype, torch.float32)
        for one, weight in self._parts:
            scale = one.row_scale()
            own = weight if factor is None else weight * (1 if scale is None else scale) / factor
            matrices.append((one.compute_B(wide) * own).to(dtype))
        return torch.cat(matrices)

    def row_scale(self) -> Tensor | None:
        scales = [(one.row_scale(), weight) for one, weight in self._parts]
        excess = [weight * (scale - 1) for scale, weight in scales if scale is not None]
        if not excess:
            return None
        factor = 1 + torch.stack(excess).sum(0)
        # Updates are divided by it, and rounded; see scale_update.
        dtype: Any = torch.bfloat16
        if self.base.quantized is None:
            dtype = self.base.linear.weight.dtype
        least = torch.finfo(dtype).eps ** 0.5
        return torch.where(factor.abs() < least, least, factor)

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        return torch.cat(self.mapped(low_rank, hidden_states, tokens), 1)

    def mapped(
        self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens
    ) -> list[Tensor]:
        """What each part's B multiplies, [T, S]."""
        parts = zip(self._parts, self._columns, strict=True)
        return [one.between(low_rank[:, own], hidden_states, tokens) for (one, _), own in parts]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()


def sum_blocks(
    base_layers: Sequence[BaseLayer],
    members: Sequence[Adapter],
    weights: Sequence[float],
    make: Callable[[Sequence[tuple[Projection, float]]], Projection],
) -> list[nn.ModuleDict]:
    """Make one of what adapters have on each projection, by the names of block and projection."""
    layers = [nn.ModuleDict() for _ in base_layers]
    for base, layer in zip(base_layers, layers, strict=True):
        for block in base.blocks:
            held = defaultdict[str, list[tuple[Projection, float]]](list)
            for member, weight in zip(members, weights, strict=True):
                for name, projection in member.weights_on(block).items():
                    held[name].append((projection, weight))
            layer[block.path] = nn.ModuleDict({name: make(pairs) for name, pairs in held.items()})
    return layers


def check_adds_up(member: Adapter) -> None:
    computes = isinstance(member, LowRankAdapter) and member.is_as_in(
        LowRankAdapter, "ffn", "ffn_weights", "group_low_rank"
    )
    if member.config.experts_per_router or len(member.own_modules) or not computes:
        what = "experts" if member.config.experts_per_router else "a separate FFN block"
        what = "extra trainable modules" if len(member.own_modules) else what
        parts = [f"{member.name}/{part}" for part in member.part_names]
        hint = f"use its experts, {', '.join(parts)}" if parts else "scale it alone: (name, scale)"
        raise AdapterError(
            "a sum supports adapters on single projections, without routers and extra trainable "
            f"modules, got {member.name!r} ({member.config.title}) with {what}; {hint}"
        )


@torch.no_grad()
def concatenate(
    sources: Sequence[tuple[AdapterConfig, Mapping[str, Tensor]]], weights: Sequence[float]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Put LoRAs' A and B behind one another, which adds their updates up exactly."""
    first, parts = sources[0][0], defaultdict[str, list[Tensor]](list)
    for (config, tensors), weight in zip(sources, weights, strict=True):
        check_is_lora(config, "adapters to concatenate must be LoRAs")
        refuse_own_parts(config, "an adapter", "be put behind another one")
        for name, tensor in tensors.items():
            key = TensorKey.parse(name)
            assert key is not None  # as all of a LoRA's are
            is_B = key.part == "lora_B"
            strength = weight * config.scaling_of(replace(key, part="")) if is_B else 1
            wide = torch.promote_types(tensor.dtype, torch.float32)
            parts[name].append(tensor.to(wide) * strength)
    tensors = {n: torch.cat(own, int(n.endswith("lora_B"))) for n, own in parts.items()}
    all_A = {n: own for n, own in tensors.items() if n.endswith("lora_A")}
    ranks = {re.escape(name.removesuffix(".lora_A")): len(own) for name, own in all_A.items()}
    rank = max(ranks.values())
    others = {place: own for place, own in ranks.items() if own != rank}
    settings: dict[str, Any] = {"rank": rank, "alpha": float(rank), "rank_stabilized": False}
    settings |= {"rank_pattern": others, "alpha_pattern": {k: float(r) for k, r in others.items()}}
    if any(source.keys() != tensors.keys() for _, source in sources):
        keys = [name.removesuffix(".lora_A") for name in all_A]
        settings |= {"target_modules": _all_targets(sources, keys), "layers": None}
    return checked(LoraConfig, first.model_dump(exclude_unset=True) | settings), tensors


def _all_targets(
    sources: Sequence[tuple[AdapterConfig, Mapping[str, Tensor]]], keys: Sequence[str]
) -> list[str]:
    """Name the projections that any of several LoRAs adapts, one by one if need be."""
    configs = [config for config, _ in sources if isinstance(config, LoraConfig)]
    has_places = any("." in target for config in configs for target in config.target_modules)
    if has_places or any(config.layers is not None for config in configs):
        return [*keys]
    return list(dict.fromkeys(key.rpartition(".")[2] for key in keys))


def check_is_lora(config: AdapterConfig, reason: str) -> None:
    if type(config) is not LoraConfig or config.weight_decomposition:
        raise AdapterError(f"{reason}, got {config.title}")
