"""Logits, losses and scores of final hidden states, each by its adapter's head.

Axes: N states, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from loraloom.models.compute_forms import ScaledAdapter
from loraloom.models.families import head_of
from loraloom.models.forward import PreparedWeights
from loraloom.models.heads import Head, Heads
from loraloom.models.hosted import HostedAdapters
from loraloom.models.layout import RowAdapter
from loraloom.ops.token_loss import token_losses, token_scores, top_tokens, trained_token_losses

_prepared: ContextVar[tuple[object, PreparedWeights] | None] = ContextVar(
    "loraloom_prepared", default=None
)


class HeadOutputs(HostedAdapters):
    """What a host computes of hidden states."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        head = head_of(model, self._family)
        self._heads = Heads(self.model.get_output_embeddings(), self.base.head, head)

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
            is_trained = head.is_own and torch.is_grad_enabled()
            losses = trained_token_losses if is_trained else token_losses
            return [losses(states, targets, head, self.config.vocab_size)]

        return self._by_head(compute, [hidden_states, labels], adapters)[0]

    def token_scores(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].
            adapters: Of each state, as in `logits`.
        """

        def compute(head: Head, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return token_scores(states, targets, head, self.config.vocab_size)

        log_probs, is_top = self._by_head(compute, [hidden_states, labels], adapters)
        return log_probs, is_top

    def top_tokens(
        self,
        hidden_states: Tensor,
        num_top: int,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute log p of the most likely next tokens, [N, K], and their ids, [N, K].

        Args:
            hidden_states: After the final norm, [N, D].
            num_top: K.
            adapters: Of each state, as in `logits`.
        """
        vocab_size = self.config.vocab_size

        def compute(head: Head, states: Tensor) -> tuple[Tensor, Tensor]:
            return top_tokens(states, head, vocab_size, min(num_top, vocab_size))

        log_probs, ids = self._by_head(compute, [hidden_states], adapters)
        return log_probs, ids

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
        """Compute something of states with each one's head; see `Heads.each`."""
        rows: Sequence[ScaledAdapter | None] = ()
        heads = (adapter.own_at(self.base.head) for adapter in self.adapters.values())
        if adapters is not None and any(head is not None for head in heads):
            names = self._row_adapters(adapters, len(tensors[0]))
            rows = [None if name is None else self._scaled(name) for name in names]
        return self._heads.each(compute, tensors, rows, prepared or self._prepared_here())

    def _prepared_here(self) -> PreparedWeights | None:
        """Return what a `with host.prepared():` of this thread keeps."""
        kept = _prepared.get()
        return kept[1] if kept is not None and kept[0] is self else None
