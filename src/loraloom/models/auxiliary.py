"""How an auxiliary loss reaches those who compute the loss: transformers' models, Trainer and trl.

A micro-batch adds its share, so that a step adds the loss once, however many micro-batches it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraloom.models.autocast import outside_autocast

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
