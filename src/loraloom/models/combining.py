"""Several adapters' weights as one adapter's, by PEFT's merge functions.

Updates are combined pair by pair of A and B, as `LoraModel.add_weighted_adapter` does it; a
mixture's expert i with the others' expert i. What is no update (routers, DoRA's magnitudes) is
averaged by the weights' shares.

Axes: I in_features, O out_features, R rank.

Source: peft 0.21.2, `peft/utils/merge_utils.py`, `peft/tuners/lora/model.py`; Yadav et al. 2023,
TIES, arXiv:2306.01708; Yu et al. 2023, DARE, arXiv:2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loraloom.adapters.keys import TensorKey
from loraloom.adapters.low_rank import seeded
from loraloom.adapters.method import Adapter, AdapterConfig
from loraloom.errors import AdapterError, ConfigError

Combination = Literal["linear", "ties", "dare_ties", "svd"]
_PAIR = {"lora_A", "lora_B"}
_AVERAGED = {"router", "magnitude"}
_FREE = {
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "rank_stabilized",
    "init",
    "experts",
    "shared_expert",
    "layers",
    "rank_pattern",
    "alpha_pattern",
    "balance_coef",
    "balance_delta",
    "expert_capacity",
}
"""Settings in which adapters that are combined may differ; those of routers' training too."""


@dataclass(frozen=True)
class _Weighted:
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
    """Combine adapters; see `Host.combine`."""
    _check(adapters, weights, combination, density)
    weighted = [
        _Weighted(adapter.config, float(weight), _places(adapter))
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    first, *others = (adapter.config for adapter in adapters)
    config = first.combined(others, _targets(weighted))
    pair = _pair_function(combination, density)
    tensors: dict[str, Tensor] = {}
    device = next(adapters[0].parameters()).device
    with torch.no_grad(), seeded(device, seed):
        for place in dict.fromkeys(place for one in weighted for place in one.places):
            holders = [one for one in weighted if place in one.places]
            tensors |= {
                str(replace(place, part=part)): tensor
                for part, tensor in _combined(place, holders, pair)
            }
    return config, tensors


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: str,
    density: float | None,
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
    first = adapters[0].config
    for adapter in adapters:
        odd = _disagreements(first, adapter.config)
        if odd:
            raise AdapterError(
                f"adapters must agree in {', '.join(odd)} to be combined, "
                f"{adapters[0].name!r} and {adapter.name!r} don't"
            )


def _disagreements(first: AdapterConfig, other: AdapterConfig) -> list[str]:
    if first.method != other.method:
        return ["method"]
    odd = [
        name
        for name, value in first.model_dump().items()
        if name not in _FREE and not name.startswith("router_") and getattr(other, name) != value
    ]
    if not odd and first.title != other.title:  # of experts with settings of their own
        odd.append("weight_decomposition")
    return odd


def _places(adapter: Adapter) -> dict[TensorKey, dict[str, Tensor]]:
    """Group an adapter's tensors by projection, expert or router."""
    places: dict[TensorKey, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors().items():
        key = TensorKey.parse(name)
        if key is None:
            raise _not_pairs(adapter.config, name)
        places.setdefault(replace(key, part=""), {})[key.part] = tensor
    for place, parts in places.items():
        if not (_PAIR <= parts.keys() <= _PAIR | _AVERAGED or parts.keys() <= _AVERAGED):
            raise _not_pairs(adapter.config, f"{place}{', '.join(parts)}")
    return places


def _not_pairs(config: AdapterConfig, what: str) -> AdapterError:
    return AdapterError(
        f"adapters that are combined must have updates of the form BA, "
        f"{config.title} has {what}; give their rows scales instead"
    )


def _combined(
    place: TensorKey, holders: Sequence[_Weighted], pair: Callable[..., tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    parts = [one.places[place] for one in holders]
    if parts[0].keys() >= _PAIR:
        strengths = [one.weight * one.config.scaling_of(place) for one in holders]
        matrices = ([part[name] for part in parts] for name in ("lora_A", "lora_B"))
        yield from zip(("lora_A", "lora_B"), pair(*matrices, strengths), strict=True)
    for name in sorted(parts[0].keys() & _AVERAGED):
        yield name, _average([part[name] for part in parts], [one.weight for one in holders])


def _average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = sum(weights)
    if total <= 0:
        raise ConfigError(
            "weights must have a positive sum where routers or magnitudes are averaged, "
            f"got {list(weights)}"
        )
    return torch.stack(
        [tensor * (weight / total) for tensor, weight in zip(tensors, weights, strict=True)]
    ).sum(0)


def _pair_function(
    combination: Combination, density: float | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what combines A [R, I] and B [O, R] of several adapters by weight times scaling."""
    functions = _merge_functions()
    if combination == "svd":
        return partial(_by_svd, functions.task_arithmetic)
    if combination == "linear":
        return partial(_by_matrix, functions.task_arithmetic)
    kept = 0.5 if density is None else density
    return partial(_by_matrix, partial(getattr(functions, combination), density=kept))


def _merge_functions() -> Any:
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ConfigError(
            "combine needs PEFT, which is not installed; run: pip install 'loraloom[peft]'"
        ) from error
    return merge_utils


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
    roots = torch.tensor([math.sqrt(abs(s)) for s in strengths], dtype=lora_A[0].dtype)
    signs = torch.tensor([math.copysign(1, s) for s in strengths], dtype=lora_A[0].dtype)
    device = lora_A[0].device
    return merge(lora_A, (roots * signs).to(device)), merge(lora_B, roots.to(device))


def _by_svd(
    task_arithmetic: Callable[[list[Tensor], Tensor], Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Give the best approximation of Σ s_i B_i A_i of the largest rank there is."""
    rank = max(map(len, lora_A))
    updates = [b @ a for a, b in zip(lora_A, lora_B, strict=True)]
    factors = torch.tensor(strengths, dtype=updates[0].dtype, device=updates[0].device)
    total = task_arithmetic(updates, factors)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]


def _targets(weighted: Sequence[_Weighted]) -> Any:
    """The projections of all adapters; with their layers, where one is not in all of them."""
    if not all(one.config.in_every_layer for one in weighted):
        places = dict.fromkeys(place for one in weighted for place in one.places)
        return tuple(f"layers.{place.layer}.{place.path}" for place in places)
    given = {str(one.config.target_modules): one.config.target_modules for one in weighted}
    if len(given) == 1:
        return next(iter(given.values()))
    names = (place.projection for one in weighted for place in one.places)
    return tuple(dict.fromkeys(name for name in names if name is not None))
