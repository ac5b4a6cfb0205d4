"""The adapters on a base model: built, looked up for the rows of a batch, merged, taken off."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from loraloom.adapters.method import Adapter, AdapterConfig, check_config
from loraloom.adapters.own import own_parts
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError
from loraloom.models.combine import Merged
from loraloom.models.extra_modules import build_own_modules
from loraloom.models.families import base_info, base_layers
from loraloom.models.layout import RowAdapter, RowAdapters, name_and_scale
from loraloom.models.stacks import ScaledAdapter
from loraloom.models.structure import family_of
from loraloom.models.wrappers import Wiring


class AdapterRegistry:
    """The adapters on a base model, by name; `merged` is the one that is in its weights."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.family = family_of(model)
        self._layers = base_layers(model, self.family)
        self.base = base_info(model, self.family, self._layers)
        self.adapters: dict[str, Adapter] = {}
        self.merged: Merged | None = None
        self.wiring = Wiring(model, self.family)
        self._detached = False

    def get(self, name: str) -> Adapter:
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise AdapterError(f"adapter must be one of those on this host ({known}), got {name!r}")
        return self.adapters[name]

    def build(self, name: str, config: AdapterConfig, seed: int = 0) -> Adapter:
        check_name(name)
        if self._detached:
            raise AdapterError(
                "host must be attached to its model, got a detached one; attach again"
            )
        if name in self.adapters:
            raise AdapterError(f"adapter name {name!r} is taken; remove it or choose another")
        dtype = torch.promote_types(torch.float32, self.model.dtype)
        parts = own_parts(check_config(config), self.base)
        with torch.inference_mode(False):  # its tensors could neither be trained nor decode
            adapter = config.build(name, self._layers, dtype, seed)
            adapter.own_modules.extend(build_own_modules(parts, self.model, dtype))
        return adapter

    def register(self, adapter: Adapter) -> Adapter:
        for own in adapter.own_modules:
            self.wiring.lead_through(own.path)  # pyright: ignore[reportArgumentType]
        self.adapters[adapter.name] = adapter
        return adapter

    def remove(self, name: str) -> None:
        self.get(name)
        if self.merged is not None and name == self.merged.name:
            raise AdapterError(f"adapter {name!r} must not be merged to be removed; unmerge it")
        del self.adapters[name]

    def unmerge(self) -> None:
        if self.merged is not None:
            self.merged.undo()
            self.merged = None

    def detach(self) -> None:
        self._detached = True
        self.unmerge()
        self.wiring.undo()
        self.adapters.clear()

    def check_unmerged(self, purpose: str) -> None:
        if self.merged is not None:
            raise AdapterError(
                f"the base model must be without a merged adapter to {purpose}, it has "
                f"{self.merged.name!r} in its weights; unmerge it first"
            )

    def rows(self, adapters: RowAdapters, batch_size: int) -> list[RowAdapter]:
        """Check the adapters of a batch's rows; one with the scale 1 is its name."""
        if isinstance(adapters, str):
            raise AdapterError(
                f"adapters must be a list, one name a row, got the text {adapters!r}"
            )
        names = [None] * batch_size if adapters is None else list(adapters)
        if len(names) != batch_size:
            raise AdapterError(
                f"adapters must have one name or None for each of the {batch_size} rows, "
                f"got {len(names)}"
            )
        return [self._checked(adapter) for adapter in names]

    def _checked(self, adapter: RowAdapter) -> RowAdapter:
        match adapter if isinstance(adapter, tuple) else (adapter, 1.0):
            case (None, _):
                return None
            case (str(name), float() | int() as scale) if math.isfinite(scale):
                self.get(name)
            case _:
                raise AdapterError(
                    "a row's adapter must be a name, (name, scale) with a finite scale, or None, "
                    f"got {adapter!r}"
                )
        if self.merged is not None and name == self.merged.name:
            raise AdapterError(
                f"adapter {name!r} is merged into the base model: give None for its rows, or "
                "unmerge it"
            )
        return name if scale == 1 else (name, float(scale))

    def scaled(self, row: RowAdapter) -> ScaledAdapter | None:
        name, scale = name_and_scale(row)
        return None if name is None else (self.adapters[name], scale)
