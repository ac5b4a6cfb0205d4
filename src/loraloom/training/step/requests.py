"""Forwards and backwards over data that comes from a caller in place of a run file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import Tensor

from loraloom.adapters.method import Adapter
from loraloom.data.tokens import Example, TrainingExample
from loraloom.errors import ConfigError, TrainingError
from loraloom.models.host import Host
from loraloom.training.step import objectives
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, Window
from loraloom.training.step.fused import forward_backward, gradients_set_aside
from loraloom.training.step.optimizers import LossScale

# From data, and log p of the labels of each row, to a scalar loss and metrics.
LossFunction = Callable[
    [Sequence[TrainingExample], Sequence[Tensor]], tuple[Tensor, Mapping[str, float | Tensor]]
]


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a forward and backward gave."""

    loss: float  # the objective's, over all data
    aux_loss: float  # router losses of a mixture, with coefficients
    metrics: dict[str, float]  # the objective's
    log_probs: list[Tensor]  # of the labels of each row, the rows of a pair in turn; on the CPU


@dataclass(frozen=True)
class Request:
    """What an adapter is to learn from next."""

    adapter: Adapter
    data: Sequence[TrainingExample]
    objective: objectives.Objective  # its means are over all of the data
    sample_key: Callable[[int], int]  # from a row's place to the key of its dropout
    reference: objectives.Reference | None = None
    micro_batch_size: int | None = None  # examples in a forward; None for all
    loss_scale: LossScale | None = None  # of gradients in float16, as it is when they are computed


def custom_objective(
    data: Sequence[TrainingExample], loss_fn: LossFunction
) -> objectives.Objective:
    def terms(
        scored: objectives.ScoredSamples, totals: objectives.StepTotals
    ) -> objectives.ObjectiveTerms:
        loss, metrics = loss_fn(data, scored.by_sample)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TrainingError(
                "loss_fn must return a scalar tensor that depends on the log-probabilities, and "
                f"metrics; got {loss!r}"
            )
        return objectives.ObjectiveTerms(loss.reshape(()), metrics)

    return terms


def run_requests(
    host: Host, requests: Sequence[Request], pad_id: int
) -> list[ForwardBackwardOutput]:
    """Add the gradients of several adapters in shared forwards.

    Args:
        host: Base model with the adapters.
        requests: Requests of different adapters; each gets the gradient that it would get alone.
        pad_id: Padding token.

    Raises:
        ConfigError: If data is empty, or two requests are for the same adapter.
        Exception: Any error of a forward or backward; gradients are unchanged then.
        TrainingError: If losses are not finite. The gradients of the adapters in the message are
            dropped, those of the others are kept.
    """
    names = [request.adapter.name for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"requests must each be of another adapter, got {', '.join(names)}; put an adapter's "
            "data into one request, or call run_requests again"
        )
    log_probs: list[list[Tensor]] = [[] for _ in requests]
    queues = [_micro_batches(*pair) for pair in zip(requests, log_probs, strict=True)]
    totals = [MicroBatchLoss(0.0) for _ in requests]
    with gradients_set_aside([request.adapter for request in requests]):
        for micro_batches in zip_longest(*queues):
            places = [place for place, batch in enumerate(micro_batches) if batch is not None]
            losses = forward_backward(host, [micro_batches[place] for place in places], pad_id)
            for place, loss in zip(places, losses, strict=True):
                totals[place] += loss
    faults = []
    for request, total in zip(requests, totals, strict=True):
        value = total.loss + total.aux_loss
        if not math.isfinite(value):
            request.adapter.zero_grad(set_to_none=True)
            faults.append(
                f"adapter {request.adapter.name}: loss must be finite, got {value}; the gradients "
                "are dropped"
            )
    if faults:
        raise TrainingError("\n".join(faults))
    return [
        ForwardBackwardOutput(total.loss, total.aux_loss, total.metrics, own)
        for total, own in zip(totals, log_probs, strict=True)
    ]


def number_rows(data: Sequence[TrainingExample]) -> list[Example]:
    rows = [row for example in data for row in example.rows]
    return [replace(row, sample_id=place) for place, row in enumerate(rows)]


def _micro_batches(request: Request, log_probs: list[Tensor]) -> list[MicroBatch]:
    def recorded(
        scored: objectives.ScoredSamples, totals: objectives.StepTotals
    ) -> objectives.ObjectiveTerms:
        log_probs.extend(values.detach().cpu() for values in scored.by_sample)
        return request.objective(scored, totals)

    if not request.data or not all(row.input_ids for one in request.data for row in one.rows):
        which = "one without tokens" if request.data else "none"
        raise ConfigError(f"adapter {request.adapter.name}: data must have examples, got {which}")
    size = len(request.data) if request.micro_batch_size is None else request.micro_batch_size
    if size < 1:
        raise ConfigError(
            f"adapter {request.adapter.name}: micro_batch_size must be 1 or more, got {size}"
        )
    window = Window(0, tuple(request.data), size)
    rows = iter(number_rows(request.data))
    scale = 1.0 if request.loss_scale is None else request.loss_scale.scale
    micro_batches = []
    for index in range(window.num_micro_batches):
        examples = [next(rows) for _ in window.micro_batch(index)]
        keys = [request.sample_key(example.sample_id) for example in examples]
        parts = (request.adapter, examples, keys, window, recorded, request.reference)
        micro_batches.append(MicroBatch(*parts, loss_scale=scale))
    return micro_batches
