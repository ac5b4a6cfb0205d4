"""Contexts for the forwards that transformers' own generation loop makes.

The loop calls the model by itself, with as many rows as it has beams. Hooks that stay on the model
give each of these forwards its context, if this thread is generating with adapters; all other
forwards pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loraloom.models.layout import RowAdapter

Open = Callable[[Tensor, Tensor | None, Sequence[RowAdapter]], AbstractContextManager[None]]
"""From a forward's tokens, mask and adapters to its context."""


@dataclass
class _Running:
    """A thread's call of transformers' `generate`.

    Args:
        generation: Of which model.
        adapters: Of each row that was given.
        forward: The context of the forward that is running.
    """

    generation: Generation
    adapters: Sequence[RowAdapter]
    forward: AbstractContextManager[None] | None = None


_running: ContextVar[_Running | None] = ContextVar("loraloom_generation", default=None)


class Generation:
    """Watches a model for forwards of transformers' `generate`.

    Args:
        model: The causal LM.
        open_forward: Opens a forward.
    """

    def __init__(self, model: nn.Module, open_forward: Open):
        self._open_forward = open_forward
        self._hooks = (
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        )

    def undo(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def of_rows(self, adapters: Sequence[RowAdapter]) -> Iterator[None]:
        """Give the forwards that this thread makes inside their adapters.

        Args:
            adapters: Of each row; beams and returned sequences take their row's.
        """
        token = _running.set(_Running(self, adapters))
        try:
            yield
        finally:
            _running.reset(token)

    def _enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        running = _running.get()
        if running is None or running.generation is not self:
            return
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        names = expand_adapters(running.adapters, len(tokens))
        running.forward = self._open_forward(tokens, kwargs.get("attention_mask"), names)
        running.forward.__enter__()

    def _leave(self, *_: Any) -> None:
        running = _running.get()
        if running is not None and running.forward is not None:
            forward, running.forward = running.forward, None
            forward.__exit__(None, None, None)


def expand_adapters(adapters: Sequence[RowAdapter], batch_size: int) -> Sequence[RowAdapter]:
    """Repeat each row's adapter for its beams or returned sequences."""
    copies = batch_size // len(adapters)
    return [name for name in adapters for _ in range(copies)]
