"""Adapters put into the base model's weights, and several adapters' weights as one adapter's."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

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


# An expert's number in the names of a routed adapter's tensors.
_EXPERT = re.compile(r"(.*?(?:experts\.|router_|offset_))(\d+)(.*)")


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
