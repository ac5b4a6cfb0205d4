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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

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
# Settings in which adapters that are combined may differ: what only scales updates, and where they
# began. Ranks and projections are compared as shapes.
_FREE = {"rank", "alpha", "rank_stabilized", "init", "experts", "layers", "alpha_pattern"}


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination: Combination,
    density: float | None,
    seed: int,
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    _check(adapters, weights, combination, density)
    config = adapters[0].config.combined()
    pair = _pair_function(combination, density)
    sources = [adapter.tensors() for adapter in adapters]
    tensors: dict[str, Tensor] = {}
    device = next(adapters[0].parameters()).device
    kind = "cuda" if device.type == "cpu" else device.type
    # PEFT's functions draw from torch's own generators.
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        for name in sources[0]:
            key, values = TensorKey.parse(name), [source[name] for source in sources]
            part = None if key is None else key.part
            if key is not None and part == "lora_A":
                place, other = replace(key, part=""), str(replace(key, part="lora_B"))
                scalings = [adapter.config.scaling_of(place) for adapter in adapters]
                strengths = [w * s for w, s in zip(weights, scalings, strict=True)]
                lora_B = [source[other] for source in sources]
                tensors[name], tensors[other] = pair(values, lora_B, strengths)
            elif part in ("router", "magnitude"):
                tensors[name] = _average(values, weights)
            elif part != "lora_B":
                raise AdapterError(
                    f"adapters that are combined must have updates of the form BA, "
                    f"{adapters[0].config.title} has {name}; give their rows scales instead"
                )
    return config, tensors


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
    first, *others = ((one.name, one.config.title, _fixed(one), _shapes(one)) for one in adapters)
    for other in others:
        if other[1:] != first[1:]:
            raise AdapterError(
                "adapters must be of one method, routed alike, of one rank and on the same "
                f"projections to be combined, {first[0]!r} ({first[1]}) and {other[0]!r} "
                f"({other[1]}) aren't; PEFT's add_weighted_adapter(combination_type='svd') "
                "combines LoRAs of several ranks"
            )


def _fixed(adapter: Adapter) -> dict[str, Any]:
    return {name: value for name, value in adapter.config.summary().items() if name not in _FREE}


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}


def _average(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if (total := sum(weights)) <= 0:
        raise ConfigError(
            "weights must have a positive sum where routers or magnitudes are averaged, "
            f"got {list(weights)}"
        )
    return torch.stack([v * (w / total) for v, w in zip(values, weights, strict=True)]).sum(0)


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
    """Compute the best approximation of Σ s_i B_i A_i of their rank."""
    rank = len(lora_A[0])
    updates = [b @ a for a, b in zip(lora_A, lora_B, strict=True)]
    total = task_arithmetic(updates, updates[0].new_tensor(strengths))
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return right[:rank], left[:, :rank] * values[:rank]
