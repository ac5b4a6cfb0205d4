"""Adapters put into the base model's weights, and several adapters' weights as one adapter's.

Updates are combined by PEFT's merge functions pair by pair of A and B, as
`LoraModel.add_weighted_adapter` does it; a mixture's expert i with the others' expert i. What is no
update (routers, DoRA's magnitudes) is averaged by the weights' shares.

Axes: I in_features, O out_features, R rank.

Source: peft 0.21.2, `peft/utils/merge_utils.py`, `peft/tuners/lora/model.py`; Yadav et al. 2023,
TIES, arXiv:2306.01708; Yu et al. 2023, DARE, arXiv:2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from loraloom.adapters.base import BaseProjection
from loraloom.adapters.keys import TensorKey
from loraloom.adapters.method import Adapter, AdapterConfig, Projection
from loraloom.adapters.own import refuse_own_parts
from loraloom.errors import AdapterError, ConfigError


@dataclass(frozen=True)
class MergeError:
    """What rounding to the base model's dtype changed, over all merged weights."""

    of_weights: float
    """‖rounded - exact‖ / ‖exact‖."""
    of_update: float
    """‖rounded - exact‖ / ‖exact - base‖: the share of the update that is lost."""


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
            lost += float((merged.to(original.dtype).to(wide) - merged).square().sum())
            exact += float(merged.square().sum())
            changed += float((merged - original.to(wide)).square().sum())
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


Combination = Literal["linear", "ties", "dare_ties", "svd"]
_PAIR = {"lora_A", "lora_B"}
_AVERAGED = {"router", "magnitude"}
# Settings in which adapters that are combined may differ; those of routers' training too.
_FREE = {
    *("rank", "alpha", "dropout", "target_modules", "rank_stabilized", "init", "experts"),
    *("shared_expert", "layers", "rank_pattern", "alpha_pattern"),
    *("balance_coef", "balance_delta", "expert_capacity"),
}


class _Source(NamedTuple):
    """An adapter with its weight, and its tensors by place in the model."""

    config: AdapterConfig
    weight: float
    places: dict[TensorKey, dict[str, Tensor]]


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: Combination,
    density: float | None,
    seed: int,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    _check(adapters, weights, combination, density)
    sources = [
        _Source(adapter.config, float(weight), _places(adapter))
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    first, *others = (adapter.config for adapter in adapters)
    config = first.combined(others, _targets(sources))
    pair = _pair_function(combination, density)
    tensors: dict[str, Tensor] = {}
    device = next(adapters[0].parameters()).device
    kind, devices = ("cuda", []) if device.type == "cpu" else (device.type, [device])
    # PEFT's functions draw from the global generators, which are left as they were.
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        for place in dict.fromkeys(place for source in sources for place in source.places):
            holders = [source for source in sources if place in source.places]
            for part, tensor in _combined(place, holders, pair):
                tensors[str(replace(place, part=part))] = tensor
    return config, tensors


def load_padded(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy values in; those of a smaller rank are filled up with zeros, which changes no BA."""
    padded = dict(tensors)
    for name, target in adapter.tensors().items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape == target.shape or tensor.dim() != target.dim():
            continue
        if all(size <= most for size, most in zip(tensor.shape, target.shape, strict=True)):
            padded[name] = tensor.new_zeros(target.shape)
            padded[name][tuple(map(slice, tensor.shape))] = tensor
    adapter.load_tensors(padded)


def _check(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: str, density: float | None
) -> None:
    if combination not in get_args(Combination):
        known = ", ".join(get_args(Combination))
        raise ConfigError(f"a combination must be one of {known}, got {combination!r}")
    if not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"weights must be a finite number for each of the adapters, at least one, "
            f"got {list(weights)} for {len(adapters)}"
        )
    if density is not None and combination not in ("ties", "dare_ties"):
        raise ConfigError(f"density is a setting of ties and dare_ties, {combination} has none")
    if density is not None and not 0 < density < 1:
        raise ConfigError(f"density must be in (0, 1), got {density}")
    first, settings = adapters[0], adapters[0].config.model_dump()
    fixed = [name for name in settings if name not in _FREE and not name.startswith("router_")]
    for adapter in adapters:
        other = adapter.config
        odd = ["method"] if other.method != first.config.method else []
        odd = odd or [name for name in fixed if getattr(other, name) != settings[name]]
        if not odd and first.config.title != other.title:  # of experts with their own settings
            odd = ["weight_decomposition"]
        if odd:
            raise AdapterError(
                f"adapters must agree in {', '.join(odd)} to be combined, "
                f"{first.name!r} and {adapter.name!r} don't"
            )


def _places(adapter: Adapter) -> dict[TensorKey, dict[str, Tensor]]:

    def not_pairs(what: str) -> AdapterError:
        return AdapterError(
            f"adapters that are combined must have updates of the form BA, "
            f"{adapter.config.title} has {what}; give their rows scales instead"
        )

    places: dict[TensorKey, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors().items():
        key = TensorKey.parse(name)
        if key is None:
            raise not_pairs(name)
        places.setdefault(replace(key, part=""), {})[key.part] = tensor
    for place, parts in places.items():
        if not (_PAIR <= parts.keys() <= _PAIR | _AVERAGED or parts.keys() <= _AVERAGED):
            raise not_pairs(f"{place}{', '.join(parts)}")
    return places


def _combined(
    place: TensorKey, sources: Sequence[_Source], pair: Callable[..., tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    parts = [source.places[place] for source in sources]
    if parts[0].keys() >= _PAIR:
        strengths = [source.weight * source.config.scaling_of(place) for source in sources]
        matrices = ([part[name] for part in parts] for name in ("lora_A", "lora_B"))
        yield from zip(("lora_A", "lora_B"), pair(*matrices, strengths), strict=True)
    for name in sorted(parts[0].keys() & _AVERAGED):
        total = sum(source.weight for source in sources)
        if total <= 0:
            raise ConfigError(
                "weights must have a positive sum where routers or magnitudes are averaged, "
                f"got {[source.weight for source in sources]}"
            )
        shares = [source.weight / total for source in sources]
        pairs = zip(parts, shares, strict=True)
        yield name, torch.stack([part[name] * share for part, share in pairs]).sum(0)


def _pair_function(
    combination: Combination, density: float | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what combines A [R, I] and B [O, R] of several adapters by weight times scaling."""
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ConfigError(
            "combine needs PEFT, which is not installed; run: pip install 'loraloom[peft]'"
        ) from error
    if combination == "svd":
        return partial(_by_svd, merge_utils.task_arithmetic)
    if combination == "linear":
        return partial(_by_matrix, merge_utils.task_arithmetic)
    kept = 0.5 if density is None else density
    return partial(_by_matrix, partial(getattr(merge_utils, combination), density=kept))


def _by_matrix(
    merge: Callable[[list[Tensor], Tensor], Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Combine all A and all B, each by the root of the strength; its sign goes to A."""
    if len({matrix.shape for matrix in lora_A}) > 1:
        ranks = sorted({len(matrix) for matrix in lora_A})
        raise AdapterError(f"adapters must have one rank, got {ranks}; combine them by svd")
    # Roots in float64, as PEFT takes them, and rounded once.
    factors = torch.tensor(strengths, dtype=torch.float64)
    roots = factors.abs().sqrt()
    signed = roots * factors.sign()
    return merge(lora_A, signed.to(lora_A[0])), merge(lora_B, roots.to(lora_B[0]))


def _by_svd(
    task_arithmetic: Callable[[list[Tensor], Tensor], Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Compute the best approximation of Σ s_i B_i A_i of the largest rank there is."""
    rank = max(map(len, lora_A))
    updates = [b @ a for a, b in zip(lora_A, lora_B, strict=True)]
    total = task_arithmetic(updates, updates[0].new_tensor(strengths))
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def _targets(sources: Sequence[_Source]) -> Any:
    places = dict.fromkeys(place for source in sources for place in source.places)
    if not all(source.config.in_every_layer for source in sources):
        return tuple(f"layers.{place.layer}.{place.path}" for place in places)
    given = {str(source.config.target_modules): source.config.target_modules for source in sources}
    if len(given) == 1:
        return next(iter(given.values()))
    names = (place.projection for place in places)
    return tuple(dict.fromkeys(name for name in names if name is not None))
