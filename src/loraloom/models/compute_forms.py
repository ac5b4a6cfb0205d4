"""Adapters' weights as forwards compute with them: cast, scaled, those of one input in a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Adapter, OwnModule
from loraloom.adapters.low_rank import input_group
from loraloom.ops.expert_ffn import FfnWeights
from loraloom.ops.low_rank import InputGroup

ScaledAdapter = tuple[Adapter, float]
"""An adapter, and a factor of what it adds to the base model."""

_Form = TypeVar("_Form")
_Key = tuple[nn.Module, *tuple[Hashable, ...]]
"""An adapter, or a module of it, and what tells its forms apart."""


class ComputeForms:
    """Makes forms of the parameters as they are, each time anew."""

    def attention(
        self, row: ScaledAdapter, layer: int, names: Sequence[str], dtype: torch.dtype
    ) -> InputGroup | None:
        """Return the attention projections that share an input; None if none is adapted."""
        adapter, scale = row
        block = adapter.attention_block(layer)
        modules = [block[name] for name in names if name in block]
        if not modules:
            return None
        key = (adapter, scale, layer, *names, dtype)
        return self._form(key, lambda: input_group(modules, dtype).scaled(scale))

    def ffn(self, row: ScaledAdapter, layer: int, dtype: torch.dtype) -> FfnWeights:
        """Return an FFN block's weights, their updates scaled."""
        adapter, scale = row
        key = (adapter, scale, layer, dtype)
        return self._form(key, lambda: adapter.ffn_weights(layer, dtype).scaled(scale))

    def own(self, own: OwnModule, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Return an adapter's own module in place of one of the base model's."""
        return self._form((own, dtype), lambda: own.compute_form(dtype))

    def _form(self, key: _Key, make: Callable[[], _Form]) -> _Form:
        return make()


class KeptForms(ComputeForms):
    """Keeps forms from the first time on, while nobody changes the weights."""

    def __init__(self) -> None:
        self._kept: dict[_Key, Any] = {}

    def forget(self, adapter: Adapter) -> None:
        """Let an adapter's forms go, as its weights have changed or it has gone."""
        gone = set(adapter.modules())
        self._kept = {key: form for key, form in self._kept.items() if key[0] not in gone}

    def passing(self) -> ComputeForms:
        """Return these forms where they are kept, and others without keeping them."""
        return _PassingForms(self)

    def _form(self, key: _Key, make: Callable[[], _Form]) -> _Form:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class _PassingForms(ComputeForms):
    def __init__(self, kept: KeptForms):
        self._forms = kept

    def _form(self, key: _Key, make: Callable[[], _Form]) -> _Form:
        kept = self._forms._kept
        return kept[key] if key in kept else make()
