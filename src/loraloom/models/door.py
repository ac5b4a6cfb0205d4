"""Contexts for forwards that others make: transformers' generation, trainers, PEFT.

They call a module as if it were any model, with as many rows as they have. Hooks on the module, its
door, ask whose the rows are, open the forward's context and close it again. A forward that a host
makes itself passes, as does one of rows that nobody speaks for. Adapters' auxiliary losses reach
those who compute the loss (transformers' models, Trainer and trl) on the way out; a micro-batch
adds its share, so that a step adds the loss once, however many micro-batches it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.models.autocast import outside_autocast
from loraloom.models.layout import RowAdapter

ASKED_FOR = "output_router_logits"
"""The argument by which trl asks a model for `aux_loss`."""
_NO_LABEL = -100


def hand_over(output: Any, loss: Tensor | None, kwargs: dict[str, Any], *, asked: bool) -> Any:
    """Add an auxiliary loss to a model's output: to its `loss`, and as `aux_loss`."""
    if loss is None:
        if asked:
            output["aux_loss"] = torch.zeros((), device=_some_tensor(output).device)
        return output
    has_loss = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
    if isinstance(output, tuple):
        return (_sum(output[0], loss, kwargs), *output[1:]) if has_loss else output
    if output.get("loss") is not None:
        output["loss"] = _sum(output["loss"], loss, kwargs)
    output["aux_loss"] = loss
    return output


def _sum(model_loss: Tensor, loss: Tensor, kwargs: dict[str, Any]) -> Tensor:
    with outside_autocast(model_loss):
        return model_loss + (loss * _share(kwargs)).to(model_loss)


def _share(kwargs: dict[str, Any]) -> Tensor | float:
    """Return the share that a micro-batch has of its step's labels, as Trainer counts them.

    Without a count the trainer averages over micro-batches itself.
    """
    total = kwargs.get("num_items_in_batch")
    if total is None:
        return 1.0
    labels = kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs["labels"][..., 1:]
    return (labels != _NO_LABEL).sum() / total


def _some_tensor(output: Any) -> Tensor:
    return next(value for value in output.values() if isinstance(value, Tensor))


def with_auxiliary_loss(config: Any) -> Any:
    """Show a model's configuration with the fields by which trl finds that there is an aux_loss.

    It is the same configuration: what is changed in one is changed in the other. The coefficient is
    1 as the loss comes with its own, and `output_router_logits` is off: a model that reads it would
    look for routers of its own.
    """
    fields = {"output_router_logits": _constant(False), "router_aux_loss_coef": _constant(1.0)}
    view = object.__new__(type(type(config).__name__, (type(config),), fields))
    view.__dict__ = config.__dict__
    return view


def _constant(value: object) -> property:
    return property(lambda self: value, lambda self, other: None)


@dataclass(frozen=True)
class Rows:
    """Whose the rows of a forward are.

    Args:
        adapters: Of each row that was given; one stands for all rows. Beams and returned sequences
            take their row's.
        training: Dropout and jitter are on, and the loss gets the adapters' auxiliary losses.
    """

    adapters: Sequence[RowAdapter]
    training: bool = False


@dataclass(frozen=True)
class Visit:
    """A forward that others make.

    Args:
        context: What it runs in.
        auxiliary_loss: Computes what its adapters add to the objective; None for nothing.
        prepare: Gives the forward's arguments by name as they are to be.
    """

    context: AbstractContextManager[None]
    auxiliary_loss: Callable[[], Tensor | None]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict


Open = Callable[[Tensor, Tensor | None, Rows], Visit | None]
"""From a forward's tokens, mask and rows to its visit; None where a forward is running already."""


@dataclass(frozen=True)
class _Inside:
    """A visit of this thread: through which door, and whether its auxiliary loss is asked for."""

    door: Door
    visit: Visit
    asked: bool


_inside: ContextVar[_Inside | None] = ContextVar("loraloom_inside", default=None)
_given: ContextVar[tuple[object, Rows] | None] = ContextVar("loraloom_rows", default=None)


def nobody() -> None:
    """Speak for no rows."""


class Door:
    """Gives the forwards that others make of a module their context."""

    def __init__(self, module: nn.Module, open_visit: Open, rows: Callable[[], Rows | None]):
        self._module = module
        self._open = open_visit
        self._rows = rows
        self._hooks = (
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
        )

    def close(self) -> None:
        """End a forward through this door that is interrupted: torch calls no hooks then."""
        inside = _inside.get()
        if inside is not None and inside.door is self:
            _close(inside)

    def undo(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def of_rows(self, rows: Rows) -> Iterator[None]:
        """Say whose the rows of this thread's forwards are."""
        _close(_inside.get())
        token = _given.set((self, rows))
        try:
            yield
        finally:
            _given.reset(token)

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        inside = _inside.get()
        if inside is not None and not inside.door.leads_to(self):
            _close(inside)
        given = _given.get()
        rows = given[1] if given is not None and given[0] is self else self._rows()
        visit = None if rows is None else self._open(*_tokens_and_mask(args, kwargs), rows)
        if visit is None:
            return None
        theirs = {name: value for name, value in kwargs.items() if name != ASKED_FOR}
        inputs = visit.prepare(theirs)
        visit.context.__enter__()
        _inside.set(_Inside(self, visit, bool(kwargs.get(ASKED_FOR))))
        return args, inputs

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        inside = _inside.get()
        if inside is None or inside.door is not self:
            return None
        _close(inside)
        if output is None:  # an error is on its way
            return None
        return hand_over(output, inside.visit.auxiliary_loss(), kwargs, asked=inside.asked)

    def leads_to(self, other: Door) -> bool:
        """Whether a forward through this door may come to another, that of a part of its module."""
        parts = self._module.modules()
        return other is not self and any(part is other._module for part in parts)


def _close(inside: _Inside | None) -> None:
    """End a visit. An interrupt leaves them open, as torch calls no hooks then."""
    if inside is not None:
        _inside.set(None)
        inside.visit.context.__exit__(None, None, None)


def _tokens_and_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Find a forward's tokens, [B, L], or what has their shape, and its mask."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs["inputs_embeds"][..., 0]
    return tokens, kwargs.get("attention_mask", args[1] if len(args) > 1 else None)


def expand_adapters(adapters: Sequence[RowAdapter], batch_size: int) -> Sequence[RowAdapter]:
    """Repeat each row's adapter for its beams or returned sequences."""
    copies = batch_size // len(adapters)
    return [name for name in adapters for _ in range(copies)]
