"""The head of each row's adapter: the base model's, or one of the adapter's own.

Axes: N states, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.models.compute_forms import ScaledAdapter
from loraloom.models.forward import PreparedWeights, forms_of
from loraloom.models.own import own_outputs


@dataclass(frozen=True)
class Head:
    """From states after the final norm to logits, scaled and soft-capped.

    Args:
        compute: Does so.
        is_own: It is an adapter's.
    """

    compute: Callable[[Tensor], Tensor]
    is_own: bool = False

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits, [N, V]."""
        return self.compute(states)


class Heads:
    """Computes with each state's head.

    Args:
        linear: The base model's output embeddings.
        path: Their place in it.
        base: Their function, and what the family does to logits: it takes states and the linear
            layer that is asked.
    """

    def __init__(self, linear: nn.Module, path: str, base: Callable[..., Tensor]):
        self._linear = linear
        self._path = path
        self._base = base

    def each(
        self,
        compute: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        rows: Sequence[ScaledAdapter | None],
        prepared: PreparedWeights | None,
    ) -> Sequence[Tensor]:
        """Compute something of states with the heads of their adapters.

        Args:
            compute: From a head and `tensors` to results.
            tensors: [N, …] each.
            rows: Each state's adapter; none at all: all are the base model's.
            prepared: Keeps heads in compute form where weights don't change.

        Returns:
            Results, [N, …] each.
        """
        groups: dict[ScaledAdapter | None, list[int]] = {}
        for place, row in enumerate(rows):
            has_own = row is not None and row[0].own_at(self._path) is not None
            groups.setdefault(row if has_own else None, []).append(place)
        if not groups.keys() - {None}:
            return compute(Head(self._base), *tensors)
        results = [
            compute(
                Head(self._base) if row is None else self._own(row, prepared),
                *(values[places] for values in tensors),
            )
            for row, places in groups.items()
        ]
        order = [place for places in groups.values() for place in places]
        inverse = torch.tensor(order, device=tensors[0].device).argsort()
        columns = zip(*results, strict=True)
        return [torch.cat(column).index_select(0, inverse) for column in columns]

    def _own(self, row: ScaledAdapter, prepared: PreparedWeights | None) -> Head:
        adapter, scale = row
        own: Any = adapter.own_at(self._path)

        def linear(states: Tensor) -> Tensor:
            # in training for each piece of the states anew: its gradient is then added up in the
            # dtype of the weights
            weights = forms_of(prepared).own(own, states.dtype)
            return own_outputs(own, weights, self._linear, states, self._linear, scale)

        return Head(lambda states: self._base(states, linear), is_own=True)
