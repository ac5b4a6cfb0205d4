"""The adapters on a base model: they are added, loaded, combined, merged and removed here."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.combining import Merged, combine
from loraloom.adapters.contract import Adapter, AdapterConfig
from loraloom.adapters.extra_modules import own_parts, tensor_shapes
from loraloom.adapters.registration import check_config
from loraloom.adapters.routed.method import build_from_sources
from loraloom.adapters.tensor_names import check_can_be_saved
from loraloom.adapters.weighted_sum import Weighted, WeightedSum, is_sum, parse_sum, write_sum
from loraloom.base.structure import read_structure
from loraloom.config.data import PromptForm
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError, shown
from loraloom.formats.files import fit_to_base, read_stored
from loraloom.formats.layouts import StoredAdapter
from loraloom.host.extra_modules import build_own_modules
from loraloom.host.layout import RowAdapter, RowAdapters, name_and_scale
from loraloom.host.prepared_weights import ScaledAdapter
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

    The base model's weights change only within `forward_lock`, where no forward runs.
    """

    def __init__(self, model: nn.Module, forward_lock: threading.RLock):
        self.model: Any = model
        self._forward_lock = forward_lock
        structure = read_structure(model)
        self.head = structure.head
        self.layers = structure.layers
        self.base = structure.info
        self.hosted = Hosted()
        self.changing = threading.RLock()
        self._sums: dict[Weighted, WeightedSum] = {}
        self.wiring = Wiring(model, structure)
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
        adapter_sum = self._sums.pop(weighted, None)
        if adapter_sum is None or [*adapter_sum.members.values()] != members:
            # another thread was late with it
            weights = [weight for _, weight in weighted]
            adapter_sum = WeightedSum(write_sum(weighted), members, weights)
            if len(self._sums) >= MAX_SUMS:
                least_recently_used = next(iter(self._sums))
                self._sums.pop(least_recently_used, None)
        self._sums[weighted] = adapter_sum
        adapter_sum.prompt = None if adapter_sum.forms_differ else members[0].prompt
        return adapter_sum

    def add(self, name: str, config: AdapterConfig, seed: int) -> Adapter:
        with self.changing:  # another thread must not merge meanwhile
            self.check_unmerged("start an adapter")
            build = partial(self.build, name, seed=seed)
            fitted = check_config(config).fitted(self.layers)
            adapter = build_from_sources(fitted, self._read_expert, build)
            return self.register(adapter)

    def _read_expert(
        self, source: str
    ) -> tuple[AdapterConfig, PromptForm | None, Mapping[str, Tensor]]:
        """Read an adapter that another one is to be made of: one on the host, or from files."""
        name, slash, _ = source.partition("/")
        adapters = self.hosted.adapters
        if name in adapters and (not slash or adapters[name].members):
            adapter = self.get(source)
            return adapter.config, adapter.prompt, adapter.tensors()
        stored = read_stored(source)
        config, tensors = fit_to_base(stored, self.base)
        return config, stored.prompt, tensors

    def load(self, name: str, stored: StoredAdapter) -> Adapter:
        config, tensors = fit_to_base(stored, self.base)
        with self.changing:
            if tensor_shapes(config, self.base).keys() - tensors.keys():
                self.check_unmerged("load what depends on its weights")
            return self._register_tensors(name, config, tensors, stored.prompt)

    def combine(self, name: str, sources: Sequence[str], weights: Sequence[float]) -> Adapter:
        adapters = [self.get(source) for source in sources]
        config, tensors = combine(adapters, weights)
        prompt = adapters[0].prompt
        if any(adapter.prompt != prompt for adapter in adapters):
            prompt = None
        return self._register_tensors(name, config, tensors, prompt)

    def _register_tensors(
        self, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor], prompt: Any
    ) -> Adapter:
        adapter = self.build(name, config)
        adapter.load_tensors(tensors)
        adapter.prompt = prompt
        return self.register(adapter)

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
            check_can_be_saved(adapter, adapter.tensors().values(), config.title)
            adapter.own_modules.extend(build_own_modules(parts, self.model, dtype))
        return adapter

    def _check_is_free(self, name: str) -> None:
        if name in self.hosted.adapters:
            raise AdapterError(f"adapter name {name!r} is taken; choose another name")

    def register(self, adapter: Adapter) -> Adapter:
        with self.changing:
            self.check_attached()
            self._check_is_free(adapter.name)
            for module in adapter.own_modules:
                self.wiring.lead_through(module.path)  # ty: ignore[invalid-argument-type]
            self._put({**self.hosted.adapters, adapter.name: adapter})
        return adapter

    def _put(self, adapters: dict[str, Adapter]) -> None:
        self.hosted = replace(self.hosted, adapters=MappingProxyType(adapters))

    def remove(self, name: str) -> None:
        with self.changing:
            adapters = dict(self.hosted.adapters)
            if _get(name, adapters) is not adapters.get(name):
                raise AdapterError(f"{name} is part of another adapter; remove the whole adapter")
            if name == self.merged_name:
                self.check_unmerged("remove it")
            removed = adapters.pop(name)
            self._put(adapters)
        for weighted, adapter_sum in list(self._sums.items()):
            if not {*removed.parts}.isdisjoint(adapter_sum.parts):
                self._sums.pop(weighted, None)

    def merge(self, name: str) -> float:
        """Merge an adapter; return the share of its update that rounding costs."""
        with self.changing, self._forward_lock:
            adapter = self.find(name)
            self.check_unmerged("merge another")
            merged = Merged(adapter)
            self.hosted = replace(self.hosted, merged=merged)
            return merged.lost

    def unmerge(self, name: str) -> None:
        written = write_sum(parse_sum(name)) if is_sum(name) else name
        with self.changing, self._forward_lock:
            if written != self.merged_name:
                raise AdapterError(
                    f"the adapter to unmerge must be {self.merged_name}, got {name!r}"
                )
            self._restore_base()

    def _restore_base(self) -> None:
        if self.hosted.merged is not None:
            self.hosted.merged.undo()
            self.hosted = replace(self.hosted, merged=None)

    @property
    def merged_name(self) -> str | None:
        return None if self.hosted.merged is None else self.hosted.merged.name

    def check_attached(self) -> None:
        if self._detached:
            raise AdapterError("the host is detached from its model; call attach() again")
        self.wiring.check_blocks()

    def detach(self) -> None:
        with self.changing, self._forward_lock:
            self._detached = True
            self._restore_base()
            self.wiring.undo.close()
            self._put({})
            self._sums.clear()

    def check_unmerged(self, purpose: str) -> None:
        if self.merged_name is not None:
            raise AdapterError(
                f"the base model must be without a merged adapter to {purpose}, it has "
                f"{self.merged_name!r} in its weights; unmerge it first"
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
        adapter = self._find(name, hosted.adapters)
        merged = hosted.merged
        if merged is not None and merged.name in [part.name for part in adapter.parts]:
            raise AdapterError(
                f"adapter {merged.name!r} is merged into the base model; use None for its "
                f"rows, or call unmerge({merged.name!r})"
            )
        return adapter, scale


def _get(name: str, adapters: Mapping[str, Adapter]) -> Adapter:
    outer_name, slash, expert = name.partition("/")
    if slash and outer_name in adapters:
        return adapters[outer_name].member(expert)
    if name not in adapters:
        names = ", ".join(adapters) or "none"
        raise AdapterError(f"adapter must be one of those on this host ({names}), got {name!r}")
    return adapters[name]


def describe(adapter: Adapter) -> str:
    """Name an adapter with its method, rank and trainable weights."""
    rank = getattr(adapter.config, "rank", None)
    num_trained = sum(weight.numel() for weight in adapter.parameters() if weight.requires_grad)
    title = adapter.config.title if rank is None else f"{adapter.config.title} of rank {rank}"
    return f"{adapter.name} ({title}, {num_trained:,} trainable)"
