"""Logits, losses and scores of final hidden states, each by its adapter's head.

Axes: N states, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.models.families import head_of
from loraloom.models.forward import PreparedWeights, forms_of
from loraloom.models.hosted import HostedAdapters
from loraloom.models.layout import RowAdapter
from loraloom.models.own import own_outputs
from loraloom.models.stacks import ScaledAdapter
from loraloom.ops.token_loss import token_losses, token_scores, trained_token_losses

_prepared: ContextVar[tuple[object, PreparedWeights] | None] = ContextVar(
    "loraloom_prepared", default=None
)


Head = Callable[[Tensor], Tensor]
"""From states after the final norm to logits, [N, V], scaled and soft-capped."""


class HeadOutputs(HostedAdapters):
    """What a host computes of hidden states."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._head = head_of(model, self._family)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keep compute forms of the weights over this thread's forwards without gradients.

        They are made once, when first needed. Inside, weights must not be changed; outside, every
        forward computes from the parameters as they are.
        """
        outer = _prepared.get()
        if outer is not None and outer[0] is self:
            yield
            return
        token = _prepared.set((self, PreparedWeights()))
        try:
            yield
        finally:
            _prepared.reset(token)

    def logits(self, hidden_states: Tensor, adapters: Sequence[RowAdapter] | None = None) -> Tensor:
        """Map final hidden states [N, …, D] to logits [N, …, V], scaled and soft-capped.

        Args:
            hidden_states: After the final norm.
            adapters: Of each state, where some may have a head of their own, as in calling the
                host; None: the base model's head for all.
        """
        return self._logits(hidden_states, adapters)

    def token_losses(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> Tensor:
        """Compute -log p of each label from the state that predicts it, in chunks.

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].
            adapters: Of each state, as in `logits`.

        Returns:
            Losses, [N] float32, differentiable with respect to the states and adapters' heads.
        """

        def compute(head: Head, states: Tensor, targets: Tensor) -> list[Tensor]:
            is_trained = head is not self._head and torch.is_grad_enabled()  # an adapter's own
            losses = trained_token_losses if is_trained else token_losses
            return [losses(states, targets, head, self.config.vocab_size)]

        return self._by_head(compute, [hidden_states, labels], adapters)[0]

    def token_scores(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        adapters: Sequence[RowAdapter] | None = None,
        num_top: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        With them come log p of the most likely tokens in its place, [N, K], and their ids, [N, K].

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].
            adapters: Of each state, as in `logits`.
            num_top: K; V where that is less.
        """
        vocab_size = self.config.vocab_size

        def compute(head: Head, states: Tensor, targets: Tensor) -> Sequence[Tensor]:
            return token_scores(states, targets, head, vocab_size, min(num_top, vocab_size))

        log_probs, is_top, top_log_probs, top_ids = self._by_head(
            compute, [hidden_states, labels], adapters
        )
        return log_probs, is_top, top_log_probs, top_ids

    def _logits(
        self,
        states: Tensor,
        adapters: Sequence[RowAdapter] | None,
        prepared: PreparedWeights | None = None,
    ) -> Tensor:
        return self._by_head(lambda head, states: [head(states)], [states], adapters, prepared)[0]

    def _by_head(
        self,
        compute: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        adapters: Sequence[RowAdapter] | None,
        prepared: PreparedWeights | None = None,
    ) -> Sequence[Tensor]:
        """Compute something of states with the heads of their adapters.

        Args:
            compute: From a head and `tensors` to results.
            tensors: [N, …] each.
            adapters: Of each state; None: the base model's head for all.
            prepared: Keeps heads in compute form where weights don't change.

        Returns:
            Results, [N, …] each.
        """
        prepared = prepared or self._prepared_here()
        groups = {} if adapters is None else self._places_by_head(adapters, len(tensors[0]))
        if not groups.keys() - {None}:
            return compute(self._head, *tensors)
        results = [
            compute(self._head_of(row, prepared), *(values[places] for values in tensors))
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
        groups: dict[ScaledAdapter | None, list[int]] = {}
        hosted = tuple(self.adapters.values())  # other threads may load and remove some
        if all(adapter.own_at(self.base.head) is None for adapter in hosted):
            return groups
        for place, name in enumerate(self._row_adapters(adapters, num_states)):
            row = None if name is None else self._scaled(name)
            has_own = row is not None and row[0].own_at(self.base.head) is not None
            groups.setdefault(row if has_own else None, []).append(place)
        return groups

    def _head_of(self, row: ScaledAdapter | None, prepared: PreparedWeights | None) -> Head:
        if row is None:
            return self._head
        adapter, scale = row
        own: Any = adapter.own_at(self.base.head)
        base = self.model.get_output_embeddings()

        def linear(states: Tensor) -> Tensor:
            # in training for each piece of the states anew: its gradient is then added up in the
            # dtype of the weights
            weights = forms_of(prepared).own(own, states.dtype)
            return own_outputs(own, weights, base, states, base, scale)

        return lambda states: self._head(states, linear)

    def _prepared_here(self) -> PreparedWeights | None:
        """Return what a `with host.prepared():` of this thread keeps."""
        kept = _prepared.get()
        return kept[1] if kept is not None and kept[0] is self else None
