"""What is computed of final hidden states by adapters' heads, where some have their own.

Axes: N states, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.models.extra_modules import own_outputs
from loraloom.models.families import head_of
from loraloom.models.layout import RowAdapter, RowAdapters
from loraloom.models.registry import AdapterRegistry
from loraloom.models.stacks import PreparedWeights, ScaledAdapter, forms_of

Head = Callable[[Tensor], Tensor]
"""From states after the final norm to logits, [N, V], scaled and soft-capped."""


class Heads:
    """The head of a base model and those that adapters have in its place."""

    def __init__(self, registry: AdapterRegistry):
        self.base = head_of(registry.model, registry.family)
        self._registry = registry

    def logits(
        self,
        states: Tensor,
        adapters: RowAdapters,
        prepared: PreparedWeights | None,
    ) -> Tensor:
        return self.compute(lambda head, states: [head(states)], [states], adapters, prepared)[0]

    def compute(
        self,
        function: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        adapters: RowAdapters,
        prepared: PreparedWeights | None,
    ) -> Sequence[Tensor]:
        """Call a function of a head and tensors, [N, …] each, with the heads of their adapters.

        Without adapters it is the base model's. Results are [N, …] each.
        """
        groups = {} if adapters is None else self._places_by_head(adapters, len(tensors[0]))
        if not groups.keys() - {None}:
            return function(self.base, *tensors)
        results = [
            function(self._head_of(row, prepared), *(values[places] for values in tensors))
            for row, places in groups.items()
        ]
        order = [place for places in groups.values() for place in places]
        inverse = torch.tensor(order, device=tensors[0].device).argsort()
        columns = zip(*results, strict=True)
        return [torch.cat(column).index_select(0, inverse) for column in columns]

    def _places_by_head(
        self, adapters: Sequence[RowAdapter], num_states: int
    ) -> dict[ScaledAdapter | None, list[int]]:
        """Group states by the adapter whose own head they have; None: the base model's."""
        registry, groups = self._registry, {}
        hosted = tuple(registry.adapters.values())  # other threads may load and remove some
        if all(adapter.own_at(registry.base.head) is None for adapter in hosted):
            return groups
        for place, row in enumerate(registry.rows(adapters, num_states)):
            scaled = registry.scaled(row)
            has_own = scaled is not None and scaled[0].own_at(registry.base.head) is not None
            groups.setdefault(scaled if has_own else None, []).append(place)
        return groups

    def _head_of(self, row: ScaledAdapter | None, prepared: PreparedWeights | None) -> Head:
        if row is None:
            return self.base
        adapter, scale = row
        own: Any = adapter.own_at(self._registry.base.head)
        base = self._registry.model.get_output_embeddings()

        def linear(states: Tensor) -> Tensor:
            # In training for each piece of the states anew: its gradient is then added up in the
            # dtype of the weights.
            weights = forms_of(prepared).own(own, states.dtype)
            return own_outputs(own, weights, base, states, base, scale)

        return lambda states: self.base(states, linear)
