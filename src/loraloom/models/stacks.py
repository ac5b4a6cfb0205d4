"""Adapters' weights as forwards compute with them: cast, scaled, and like ones side by side."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loraloom.adapters.low_rank import input_group
from loraloom.adapters.method import Adapter, OwnModule
from loraloom.ops.expert_ffn import FfnWeights
from loraloom.ops.low_rank import InputGroup
from loraloom.ops.stacked import StackedFfn, StackedInput, stack_inputs

ScaledAdapter = tuple[Adapter, float]
"""An adapter, and a factor of what it adds to the base model."""

_Form = TypeVar("_Form")
_Key = tuple[nn.Module, *tuple[Hashable, ...]]
"""An adapter, or a module of it, and what tells its forms apart."""


class ComputeForms:
    """Makes forms of the parameters as they are, each time anew but for those that are kept.

    Args:
        kept: Forms that are used again, while nobody changes the weights.
        keeps: Keep new ones too.
    """

    def __init__(self, kept: dict[_Key, Any] | None = None, *, keeps: bool = False):
        self._kept = {} if kept is None else kept
        self._keeps = keeps

    def passing(self) -> ComputeForms:
        """Return these forms where they are kept, and others without keeping them."""
        return ComputeForms(self._kept)

    def forget(self, adapter: Adapter) -> None:
        """Let an adapter's forms go, as its weights have changed or it has gone."""
        gone = set(adapter.modules())
        for key in [key for key in self._kept if key[0] in gone]:
            del self._kept[key]

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
        if key in self._kept:
            return self._kept[key]
        form = make()
        if self._keeps:
            self._kept[key] = form
        return form


class Stack:
    """Like adapters' weights in compute form, layer by layer, made when first asked for.

    Adapters come and go; what is there of the others stays.

    Attributes:
        adapters: In the order of their entries; all are alike.
    """

    def __init__(self, dtype: torch.dtype, forms: ComputeForms):
        self.adapters: tuple[ScaledAdapter, ...] = ()
        self._dtype = dtype
        self._forms = forms
        self._inputs: dict[tuple[int, tuple[str, ...]], StackedInput | None] = {}
        self._ffns: dict[int, StackedFfn] = {}

    def keep(self, entries: Sequence[int]) -> None:
        """Let all other adapters go."""
        self.adapters = tuple(self.adapters[entry] for entry in entries)
        if not entries:
            self._inputs, self._ffns = {}, {}
        for key, inputs in self._inputs.items():
            self._inputs[key] = inputs and inputs.take(entries)
        for layer, ffn in self._ffns.items():
            self._ffns[layer] = ffn.take(entries)

    def add(self, adapters: tuple[ScaledAdapter, ...]) -> None:
        """Put other ones behind those that are there."""
        added = Stack(self._dtype, self._forms)
        added.adapters = adapters
        self.adapters += adapters
        for key, inputs in self._inputs.items():
            more = added.attention(*key)
            self._inputs[key] = inputs and more and inputs.followed_by(more)
        for layer, ffn in self._ffns.items():
            self._ffns[layer] = ffn.followed_by(added.ffn(layer))

    def attention(self, layer: int, names: tuple[str, ...]) -> StackedInput | None:
        """Return the attention projections that share an input; None if none is adapted."""
        key = (layer, names)
        if key not in self._inputs:
            forms = [self._forms.attention(row, layer, names, self._dtype) for row in self.adapters]
            groups = [form for form in forms if form is not None]  # all have one, or none
            self._inputs[key] = stack_inputs(groups) if groups else None
        return self._inputs[key]

    def ffn(self, layer: int) -> StackedFfn:
        """Return an FFN block's weights."""
        if layer not in self._ffns:
            adapters = [adapter for adapter, _ in self.adapters]
            weights = [self._forms.ffn(row, layer, self._dtype) for row in self.adapters]
            self._ffns[layer] = adapters[0].stack_ffn(adapters, layer, weights)
        return self._ffns[layer]


class StackPart:
    """Adapters that lie behind one another in a stack; views of its weights."""

    def __init__(self, stack: Stack, entries: slice):
        self.adapters = stack.adapters[entries]
        self._stack = stack
        self._entries = entries
        self._inputs: dict[tuple[int, tuple[str, ...]], StackedInput | None] = {}
        self._ffns: dict[int, StackedFfn] = {}

    @property
    def adapts_ffn(self) -> bool:
        """Whether they have weights in FFN blocks: in all of them, or in none."""
        return self.adapters[0][0].adapts_ffn(0)

    def attention(self, layer: int, names: tuple[str, ...]) -> StackedInput | None:
        """See Stack."""
        key = (layer, names)
        if key not in self._inputs:
            whole = self._stack.attention(layer, names)
            self._inputs[key] = whole and whole.take(self._entries)
        return self._inputs[key]

    def ffn(self, layer: int) -> StackedFfn:
        """See Stack."""
        if layer not in self._ffns:
            self._ffns[layer] = self._stack.ffn(layer).take(self._entries)
        return self._ffns[layer]


class Stacks:
    """A stack for each kind of adapters that were used together."""

    def __init__(self, forms: ComputeForms, on_change: Callable[[], object]):
        self._forms = forms
        self._on_change = on_change
        self._stacks: dict[Hashable, Stack] = {}

    def take(self, adapters: tuple[ScaledAdapter, ...], dtype: torch.dtype) -> StackPart:
        """Return a part of a stack with these adapters, all of which are alike.

        Others may lie between them, which go when they are more than these.
        """
        key = (adapters[0][0].stack_key(), dtype)
        # popped, so that what fails half-way is gone
        stack = self._stacks.pop(key, None) or Stack(dtype, self._forms)
        missing = tuple(adapter for adapter in adapters if adapter not in stack.adapters)
        if missing:
            self._on_change()
            stack.add(missing)
        places = [stack.adapters.index(adapter) for adapter in adapters]
        pairs = zip(adapters, adapters[1:], places, places[1:], strict=False)
        if any(one[0] is next_one[0] and at > then for one, next_one, at, then in pairs):
            # a record has an adapter's scales in the order of the rows
            others = [n for n in range(len(stack.adapters)) if n not in places]
            self._on_change()
            stack.keep([*places, *others])
        entries = _span(stack, adapters)
        if entries.stop - entries.start > 2 * len(adapters):
            self._on_change()
            stack.keep(sorted(map(stack.adapters.index, adapters)))
            entries = _span(stack, adapters)
        self._stacks[key] = stack
        return StackPart(stack, entries)

    def forget(self, adapter: Adapter) -> None:
        """Let an adapter's weights go, however they are scaled."""
        self._on_change()
        for stack in self._stacks.values():
            others = [place for place, one in enumerate(stack.adapters) if one[0] is not adapter]
            if len(others) < len(stack.adapters):
                stack.keep(others)


def _span(stack: Stack, adapters: Sequence[ScaledAdapter]) -> slice:
    """Where a stack has adapters, and perhaps others between them."""
    entries = [stack.adapters.index(adapter) for adapter in adapters]
    return slice(min(entries), max(entries) + 1)
