"""The adapters on a base model, and what their heads compute of final hidden states.

Axes: N states, D hidden, V vocabulary.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.combining import Merged
from loraloom.adapters.contract import Adapter, AdapterConfig, check_config
from loraloom.adapters.extra_modules import own_parts
from loraloom.adapters.weighted_sum import Weighted, WeightedSum, is_sum, parse_sum, write_sum
from loraloom.base.structure import Head, read_structure
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError, shown
from loraloom.host.extra_modules import build_own_modules, own_outputs
from loraloom.host.layout import RowAdapter, RowAdapters, name_and_scale
from loraloom.host.prepared_weights import PreparedWeights, ScaledAdapter, forms_of
from loraloom.host.wiring import Wiring

# Sums of adapters that are kept; they have no weights of their own.
MAX_SUMS = 256


@dataclass(frozen=True)
class Hosted:
    """The adapters on a base model at a moment, by name, and which of them is in its weights."""

    adapters: Mapping[str, Adapter] = field(default_factory=lambda: MappingProxyType({}))
    merged: Merged | None = None


class AdapterRegistry:
    """What is on a base model. Changes take turns by `changing`; readers take `hosted` as it is.

    `head` is the base model's, in whose place adapters may have others.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        structure = read_structure(model)
        self.head = structure.head
        self.layers = structure.layers
        self.base = structure.info
        self.hosted = Hosted()
        self.changing = threading.RLock()
        self._sums: dict[Weighted, WeightedSum] = {}
        self.wiring = Wiring(model, self.base.layers_path, self.layers)
        self._detached = False

    def find(self, name: str) -> Adapter:
        """Return an adapter, or the sum of several that a name is of."""
        return self._find(name, self.hosted.adapters)

    def get(self, name: str) -> Adapter:
        return _get(name, self.hosted.adapters)

    def _find(self, name: str, adapters: Mapping[str, Adapter]) -> Adapter:
        if is_sum(name):
            return self._sum(parse_sum(name), adapters)
        return _get(name, adapters)

    def _sum(self, weighted: Weighted, adapters: Mapping[str, Adapter]) -> WeightedSum:
        # one object for as long as its members are there, by which prepared weights are found
        members = [_get(name, adapters) for name, _ in weighted]
        known = self._sums.pop(weighted, None)
        if known is None or [*known.members.values()] != members:  # a thread was late with it
            known = WeightedSum(write_sum(weighted), members, [weight for _, weight in weighted])
            if len(self._sums) >= MAX_SUMS:
                self._sums.pop(next(iter(self._sums)), None)  # the least recently used
        self._sums[weighted] = known
        known.prompt = None if known.forms_differ else members[0].prompt
        return known

    def build(self, name: str, config: AdapterConfig, seed: int = 0) -> Adapter:
        check_name(name)
        self.check_attached()
        self._check_is_free(name)
        dtype = torch.promote_types(torch.float32, self.model.dtype)
        parts = own_parts(check_config(config), self.base)
        config.check_fits(self.layers)
        # Tensors of inference mode could neither be trained nor decode; draws are the CPU's.
        with torch.inference_mode(False), torch.device("cpu"):
            adapter = config.build(name, self.layers, dtype, seed)
            adapter.check_can_be_saved()
            adapter.own_modules.extend(build_own_modules(parts, self.model, dtype))
        return adapter

    def _check_is_free(self, name: str) -> None:
        if name in self.hosted.adapters:
            raise AdapterError(f"adapter name {name!r} is taken; choose another name")

    def register(self, adapter: Adapter) -> Adapter:
        with self.changing:
            self.check_attached()
            self._check_is_free(adapter.name)
            for own in adapter.own_modules:
                self.wiring.lead_through(own.path)  # pyright: ignore[reportArgumentType]
            self._put({**self.hosted.adapters, adapter.name: adapter})
        return adapter

    def _put(self, adapters: dict[str, Adapter]) -> None:
        self.hosted = replace(self.hosted, adapters=MappingProxyType(adapters))

    def remove(self, name: str) -> None:
        with self.changing:
            adapters, merged = dict(self.hosted.adapters), self.hosted.merged
            if _get(name, adapters) is not adapters.get(name):
                raise AdapterError(f"{name} is part of another adapter; remove the whole adapter")
            if merged is not None and name == merged.name:
                self.check_unmerged("remove it")
            removed = adapters.pop(name)
            self._put(adapters)
        for weighted, adapter_sum in list(self._sums.items()):
            if not {*removed.parts}.isdisjoint(adapter_sum.parts):
                self._sums.pop(weighted, None)

    def merge(self, adapter: Adapter) -> Merged:
        merged = Merged(adapter)
        self.hosted = replace(self.hosted, merged=merged)
        return merged

    def unmerge(self) -> None:
        if self.hosted.merged is not None:
            self.hosted.merged.undo()
            self.hosted = replace(self.hosted, merged=None)

    def check_attached(self) -> None:
        if self._detached:
            raise AdapterError("the host is detached from its model; call attach() again")
        self.wiring.check_blocks()

    def detach(self) -> None:
        self._detached = True
        self.unmerge()
        self.wiring.undo.close()
        self._put({})
        self._sums.clear()

    def check_unmerged(self, purpose: str) -> None:
        merged = self.hosted.merged
        if merged is not None:
            raise AdapterError(
                f"the base model must be without a merged adapter to {purpose}, it has "
                f"{merged.name!r} in its weights; unmerge it first"
            )

    def rows(self, adapters: RowAdapters, num_rows: int) -> list[ScaledAdapter | None]:
        """Find the adapters of a batch's rows."""
        names = [None] * num_rows if adapters is None else list(adapters)
        if isinstance(adapters, str) or len(names) != num_rows:
            got = shown(adapters) if isinstance(adapters, str) else len(names)
            raise AdapterError(f"adapters must have one for each of the {num_rows} rows, got {got}")
        hosted = self.hosted
        return [self._row(adapter, hosted) for adapter in names]

    def _row(self, row: RowAdapter, hosted: Hosted) -> ScaledAdapter | None:
        name, scale = name_and_scale(row)
        if name is None:
            return None
        adapter, merged = self._find(name, hosted.adapters), hosted.merged
        if merged is not None and merged.name in [part.name for part in adapter.parts]:
            raise AdapterError(
                f"adapter {merged.name!r} is merged into the base model; use None for its "
                f"rows, or call unmerge({merged.name!r})"
            )
        return adapter, scale

    def logits(
        self, states: Tensor, adapters: RowAdapters, prepared: PreparedWeights | None
    ) -> Tensor:
        return self.by_heads(lambda head, states: [head(states)], [states], adapters, prepared)[0]

    def by_heads(
        self,
        function: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        adapters: RowAdapters,
        prepared: PreparedWeights | None,
    ) -> Sequence[Tensor]:
        """Call a function of a head and tensors, [N, …] each, with the heads of their adapters."""
        # Without adapters it is the base model's. Results are [N, …] each.
        path, groups, rows = self.base.head, {}, []
        hosted = self.hosted.adapters.values()
        if adapters is not None and any(adapter.own_at(path) is not None for adapter in hosted):
            rows = self.rows(adapters, len(tensors[0]))
        for place, row in enumerate(rows):
            has_own = row is not None and row[0].own_at(path) is not None
            groups.setdefault(row if has_own else None, []).append(place)
        if not groups.keys() - {None}:
            return function(self.head, *tensors)
        results = [
            function(self._head_of(row, prepared), *(values[places] for values in tensors))
            for row, places in groups.items()
        ]
        order = [place for places in groups.values() for place in places]
        inverse = torch.tensor(order, device=tensors[0].device).argsort()
        return [torch.cat(one).index_select(0, inverse) for one in zip(*results, strict=True)]

    def _head_of(self, row: ScaledAdapter | None, prepared: PreparedWeights | None) -> Head:
        if row is None:
            return self.head
        adapter, scale = row
        own: Any = adapter.own_at(self.base.head)
        base = self.model.get_output_embeddings()

        def linear(states: Tensor) -> Tensor:
            # In training for each piece anew: gradients are then added up in the weights' dtype.
            return own_outputs(own, forms_of(prepared).own(own, states.dtype), base, states, scale)

        return lambda states: self.head(states, linear)


def _get(name: str, adapters: Mapping[str, Adapter]) -> Adapter:
    whole, within, part = name.partition("/")
    if within and whole in adapters:
        return adapters[whole].member(part)
    if name not in adapters:
        known = ", ".join(adapters) or "none"
        raise AdapterError(f"adapter must be one of those on this host ({known}), got {name!r}")
    return adapters[name]


def describe(adapter: Adapter) -> str:
    """Name an adapter with its method, rank and trainable weights."""
    rank = getattr(adapter.config, "rank", None)
    num_trained = sum(weight.numel() for weight in adapter.parameters() if weight.requires_grad)
    title = adapter.config.title if rank is None else f"{adapter.config.title} of rank {rank}"
    return f"{adapter.name} ({title}, {num_trained:,} trainable)"
