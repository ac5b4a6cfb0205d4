"""Adapters put into the base model's weights, and several adapters' weights as one adapter's.

Axes: I in_features, O out_features, R rank.

Source: peft 0.21.2, `peft/tuners/lora/model.py` (`add_weighted_adapter`).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraloom.adapters.contract import Adapter, AdapterConfig, Projection
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.tensor_names import TensorKey
from loraloom.adapters.weighted_sum import concatenate
from loraloom.base.blocks import BaseInfo, BaseProjection
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


Combination = Literal["linear", "svd", "cat"]
# An expert's number in the names of a routed adapter's tensors.
_EXPERT = re.compile(r"(.*?(?:experts\.|router_|offset_))(\d+)(.*)")
# Settings in which adapters that are combined may differ: what only scales updates, and where they
# began. Ranks and projections are compared as shapes.
_MAY_DIFFER = {"rank", "alpha", "rank_stabilized", "init", "experts", "layers", "alpha_pattern"}


@torch.no_grad()
def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: Combination
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Combine updates pair by pair of A and B, and average what is none by the weights' shares."""
    _check(adapters, weights, combination)
    if combination == "cat":
        sources = [(adapter.config, adapter.tensors()) for adapter in adapters]
        return concatenate(sources, weights)
    config = adapters[0].config.combined()
    if not (adapters[0].is_mergeable or config.experts_per_router):
        AdapterConfig.combined(config)  # an error: it is no BA
    sources = [adapter.tensors() for adapter in adapters]
    tensors: dict[str, Tensor] = {}
    for name in sources[0]:
        key = TensorKey.parse(name)
        values = [source[name] for source in sources]
        if key is not None and key.part == "lora_A":
            name_of_B = str(replace(key, part="lora_B"))
            tensors[name], tensors[name_of_B] = _combine_updates(
                lora_A=values,
                lora_B=[source[name_of_B] for source in sources],
                strengths=[
                    weight * adapter.config.scaling_of(key)
                    for weight, adapter in zip(weights, adapters, strict=True)
                ],
                by_svd=combination == "svd",
            )
        elif key is not None and key.part in ("router", "magnitude"):
            total = sum(weights)
            if total <= 0:
                raise ConfigError(
                    "weights must have a positive sum to average routers or magnitudes, "
                    f"got {list(weights)}"
                )
            tensors[name] = _sum(values, [weight / total for weight in weights])
        elif key is None or key.part != "lora_B":
            raise AdapterError(
                f"{adapters[0].config.title} adapters with {name} cannot be combined, because "
                "their updates are not of the form BA; scale each row's adapter: (name, scale)"
            )
    return config, tensors


@torch.no_grad()
def prune(
    adapter: Adapter, experts: Sequence[int], base: BaseInfo
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Take the tensors of some experts, and their part of what has an axis of experts."""
    config = adapter.config
    size = len(adapter.members) or getattr(config, "num_experts", None)
    if not isinstance(size, int):
        raise AdapterError(
            "only mixtures whose num_experts is one number can be pruned, "
            f"got {adapter.name!r} ({config.title})"
        )
    if not experts or {*experts} - {*range(size)} or len({*experts}) < len(experts):
        raise ConfigError(
            f"experts must be different ones of 0 to {size - 1}, at least one, got {list(experts)}"
        )
    if adapter.members:
        return _prune_members(adapter, experts)
    # Axes of experts are those that one more would make longer.
    longer = config.model_copy(update={"num_experts": size + 1}).tensor_shapes(base)
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors().items():
        new_name = name
        key = TensorKey.parse(name)
        if key is not None and key.expert is not None:
            if key.expert not in experts:
                continue
            new_name = str(replace(key, expert=experts.index(key.expert)))
        indices = torch.tensor(experts, device=tensor.device)
        shape = longer.get(new_name, tensor.shape)  # a module of its own is none of the method's
        for axis in range(tensor.ndim):
            if shape[axis] != tensor.shape[axis]:
                tensor = tensor.index_select(axis, indices)
        tensors[new_name] = tensor
    settings = config.model_dump(exclude_unset=True) | {"num_experts": len(experts)}
    return checked(type(config), settings), tensors


def _prune_members(
    adapter: Adapter, experts: Sequence[int]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    names = list(adapter.members)
    settings = dict(adapter.config)
    settings["experts"] = {names[e]: settings["experts"][names[e]] for e in experts}
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors().items():
        before, number, after = _EXPERT.findall(name)[0]
        if int(number) in experts:
            tensors[f"{before}{experts.index(int(number))}{after}"] = tensor
    return checked(type(adapter.config), settings), tensors


def _check(adapters: Sequence[Adapter], weights: Sequence[float], combination: str) -> None:
    if combination not in get_args(Combination):
        raise ConfigError(
            f"a combination must be one of {', '.join(get_args(Combination))}, got "
            f"{combination!r}; PEFT's add_weighted_adapter has others for LoRA"
        )
    if not adapters or len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"weights must be a finite number for each of the adapters, at least one, "
            f"got {list(weights)} for {len(adapters)}"
        )
    for adapter in adapters:
        refuse_own_parts(adapter.config, f"adapter {adapter.name!r}", "be combined")
        if adapter.adapts_stacks:
            raise AdapterError(
                f"adapter {adapter.name!r} has updates of stacked experts, which cannot be "
                "combined; choose it for each row: (name, scale)"
            )
    if combination == "cat":
        return
    first = adapters[0]
    for adapter in adapters[1:]:
        is_alike = adapter.config.title == first.config.title
        if not is_alike or _decisive(adapter) != _decisive(first):
            raise AdapterError(
                "adapters to combine must have the same method, routing, rank and projections, "
                f"got {first.name!r} ({first.config.title}) and {adapter.name!r} "
                f"({adapter.config.title}); use `cat` for LoRAs of different ranks"
            )


def _decisive(adapter: Adapter) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    settings = adapter.config.summary()
    decisive = {name: settings[name] for name in settings if name not in _MAY_DIFFER}
    return decisive, {name: tensor.shape for name, tensor in adapter.tensors().items()}


def _sum(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    return torch.stack([t * factor for t, factor in zip(tensors, factors, strict=True)]).sum(0)


def _combine_updates(
    *, lora_A: list[Tensor], lora_B: list[Tensor], strengths: Sequence[float], by_svd: bool
) -> tuple[Tensor, Tensor]:
    """Add up all A and all B, or take the best approximation of Σ s_i B_i A_i of their rank."""
    if not by_svd:  # each by the root of the strength, whose sign goes to A
        roots = [abs(strength) ** 0.5 for strength in strengths]
        signed = [math.copysign(root, sign) for root, sign in zip(roots, strengths, strict=True)]
        return _sum(lora_A, signed), _sum(lora_B, roots)
    rank = len(lora_A[0])
    updates = [B @ A for A, B in zip(lora_A, lora_B, strict=True)]
    left, values, right = torch.linalg.svd(_sum(updates, strengths), full_matrices=False)
    A = right[:rank]
    B = left[:, :rank] * values[:rank]
    num_missing = max(rank - len(values), 0)  # of its size, a matrix has no more rows to give
    return pad(A, (0, 0, 0, num_missing)), pad(B, (0, num_missing))
