"""Logits and losses of final hidden states, by the heads of their adapters.

Axes: N states, D hidden, V vocabulary, K most likely tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.segment import Records, Samples
from loraloom.base.structure import Head, text_config
from loraloom.host.extra_modules import own_outputs
from loraloom.host.forwards import ThreadState
from loraloom.host.layout import RowAdapters
from loraloom.host.prepared_weights import ScaledAdapter, forms_of
from loraloom.host.registry import AdapterRegistry
from loraloom.ops.token_loss import token_losses, token_scores, trained_token_losses


class Heads:
    """The base model's head, and those that adapters have in its place."""

    def __init__(self, registry: AdapterRegistry, thread: ThreadState):
        self._registry = registry
        self._thread = thread

    @property
    def _vocab_size(self) -> int:
        return text_config(self._registry.model).vocab_size

    def logits(self, states: Tensor, adapters: RowAdapters) -> Tensor:
        def compute(head: Head, states: Tensor) -> list[Tensor]:
            return [head(states)]

        return self._by_heads(compute, [states], adapters)[0]

    def token_losses(self, states: Tensor, labels: Tensor, adapters: RowAdapters) -> Tensor:
        def compute(head: Head, states: Tensor, labels: Tensor) -> list[Tensor]:
            is_adapters = head is not self._registry.head
            losses = token_losses
            if is_adapters and torch.is_grad_enabled():
                losses = trained_token_losses
            return [losses(states, labels, head, self._vocab_size)]

        return self._by_heads(compute, [states, labels], adapters)[0]

    def token_scores(
        self, states: Tensor, labels: Tensor, adapters: RowAdapters, num_top: int
    ) -> Sequence[Tensor]:
        num_top = min(num_top, self._vocab_size)

        def compute(head: Head, states: Tensor, labels: Tensor) -> Sequence[Tensor]:
            return token_scores(states, labels, head, self._vocab_size, num_top)

        return self._by_heads(compute, [states, labels], adapters)

    def auxiliary_loss(
        self, routing: Mapping[str, Records], samples: Mapping[str, Samples]
    ) -> Tensor | None:
        """Add up what adapters add to the objective; None for nothing."""
        losses = []
        for name, records in routing.items():
            config = self._registry.find(name).config
            loss = config.auxiliary_loss(records, samples.get(name))
            if loss is not None:
                losses.append(loss)
        return torch.stack(losses).sum() if losses else None

    def _by_heads(
        self,
        function: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        adapters: RowAdapters,
    ) -> Sequence[Tensor]:
        """Call a function of a head and tensors, [N, …] each, with the heads of their adapters."""
        rows_by_head = self._rows_by_head(adapters, len(tensors[0]))
        if not rows_by_head.keys() - {None}:
            return function(self._registry.head, *tensors)
        results = []
        for adapter, rows in rows_by_head.items():
            head = self._head_of(adapter)
            results.append(function(head, *(values[rows] for values in tensors)))
        order = [row for rows in rows_by_head.values() for row in rows]
        inverse = torch.tensor(order, device=tensors[0].device).argsort()
        columns = zip(*results, strict=True)
        return [torch.cat(column).index_select(0, inverse) for column in columns]

    def _rows_by_head(
        self, adapters: RowAdapters, num_rows: int
    ) -> dict[ScaledAdapter | None, list[int]]:
        """Group rows by the adapter whose head they have; None: the base model's."""
        path = self._registry.base.head
        hosted = self._registry.hosted.adapters.values()
        if adapters is None or all(adapter.own_at(path) is None for adapter in hosted):
            return {}
        rows_by_head: dict[ScaledAdapter | None, list[int]] = {}
        for row, adapter in enumerate(self._registry.rows(adapters, num_rows)):
            if adapter is not None and adapter[0].own_at(path) is None:
                adapter = None
            rows_by_head.setdefault(adapter, []).append(row)
        return rows_by_head

    def _head_of(self, row: ScaledAdapter | None) -> Head:
        if row is None:
            return self._registry.head
        adapter, scale = row
        own_head: Any = adapter.own_at(self._registry.base.head)
        base_linear = self._registry.model.get_output_embeddings()

        def linear(states: Tensor) -> Tensor:
            # In training for each piece anew: gradients are then added up in the weights' dtype.
            weights = forms_of(self._thread.prepared).own(own_head, states.dtype)
            return own_outputs(own_head, weights, base_linear, states, scale)

        return lambda states: self._registry.head(states, linear)
