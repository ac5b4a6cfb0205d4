"""The fused step: micro-batches of many jobs in one forward and one backward.

Axes: B rows of all jobs, L sequence, N labelled tokens, D hidden.

Rows are collated by job (`rows.py`). Logits exist at labels only. The sum of the jobs' losses is
differentiated at once; as no adapter's weights touch another's rows, each gets the gradient of its
own loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from loraloom.adapters.adapter import SampleTokens
from loraloom.infer.rows import collate, example_row
from loraloom.models.host import Host
from loraloom.routing.record import LayerRouting
from loraloom.routing.statistics import RouterStatistics, measure_load, read_statistics
from loraloom.training.step.micro_batch import MicroBatch, MicroBatchLoss
from loraloom.training.step.objectives import ScoredSamples
from loraloom.training.step.reference import ask_references
from loraloom.training.step.rows import lay_out
from loraloom.training.step.window import count_labels


def forward_backward(
    host: Host, micro_batches: Sequence[MicroBatch], pad_id: int
) -> list[MicroBatchLoss]:
    """Add each micro-batch's gradient to its adapter's.

    A loss is the micro-batch's share of its objective over the whole step, so that the gradient
    does not depend on how the step is cut. A loss that is not finite is left out of the backward
    pass; its adapter's gradient is of no use then.

    Args:
        host: With the micro-batches' adapters.
        micro_batches: One of each job.
        pad_id: Token to pad with, on the right.

    Returns:
        The losses, in the order of the micro-batches.
    """
    ask_references(host, [(batch.reference, batch.examples) for batch in micro_batches])
    layout = lay_out(micro_batches)
    rows = [example_row(example) for example in layout.joined()]
    inputs = collate(rows, host.dtype, host.device, pad_id)
    output = host.hidden(
        inputs.input_ids,
        None if layout.is_packed else inputs.attention_mask,
        adapters=layout.adapters,
        sample_keys=layout.sample_keys,
        sample_lengths=layout.sample_lengths,
        training=True,
    )
    states = inputs.predicting_states(output.last_hidden_state)
    losses = host.token_losses(states, inputs.targets)
    routing = [output.routing.get(batch.adapter.name) for batch in micro_batches]
    terms = [
        _loss_terms(*of_batch)
        for of_batch in zip(
            micro_batches,
            layout.split_losses(losses),
            routing,
            layout.sample_tokens,
            strict=True,
        )
    ]
    values = _fetch(terms, routing)
    _backward(
        [
            term["loss"] + term["aux_loss"]
            for term, fetched in zip(terms, values, strict=True)
            if math.isfinite(fetched.terms["loss"] + fetched.terms["aux_loss"])
        ]
    )
    return [
        _report(micro_batch, fetched, computed_tokens)
        for micro_batch, fetched, computed_tokens in zip(
            micro_batches, values, layout.computed_tokens, strict=True
        )
    ]


@dataclass(frozen=True)
class _Fetched:
    """A micro-batch's numbers, read from the device."""

    terms: dict[str, float]
    routers: RouterStatistics | None


def _loss_terms(
    micro_batch: MicroBatch,
    token_losses: Tensor,
    routing: list[LayerRouting] | None,
    samples: Sequence[SampleTokens],
) -> dict[str, Tensor]:
    """Return a micro-batch's share of the step's loss, router loss and metrics."""
    terms = micro_batch.objective.terms(
        _scored(micro_batch, token_losses), micro_batch.window.totals
    )
    aux_loss = torch.zeros_like(terms.loss)
    adapter = micro_batch.adapter
    added = None if routing is None else adapter.auxiliary_loss(routing, samples)
    if added is not None:
        aux_loss = (added * _token_share(micro_batch)).to(terms.loss.dtype)
    return {"loss": terms.loss, "aux_loss": aux_loss, **terms.metrics}


def _scored(micro_batch: MicroBatch, token_losses: Tensor) -> ScoredSamples:
    references = None
    if micro_batch.reference is not None:
        references = token_losses.new_tensor(micro_batch.reference.of(micro_batch.examples))
    return ScoredSamples(-token_losses, list(map(count_labels, micro_batch.examples)), references)


def _fetch(
    terms: Sequence[dict[str, Tensor]], routing: Sequence[list[LayerRouting] | None]
) -> list[_Fetched]:
    """Read all numbers of a round from the device at once."""
    scalars = torch.stack([value.detach() for term in terms for value in term.values()])
    loads = [torch.empty(0) if record is None else measure_load(record) for record in routing]
    numbers = iter(
        torch.cat([values.to(scalars.device).double() for values in (scalars, *loads)]).tolist()
    )
    named = [{name: next(numbers) for name in term} for term in terms]
    return [
        _Fetched(
            own,
            None if record is None else read_statistics(record, list(islice(numbers, len(load)))),
        )
        for own, record, load in zip(named, routing, loads, strict=True)
    ]


def _backward(losses: Sequence[Tensor]) -> None:
    if losses:
        torch.stack(list(losses)).sum().backward()


def _report(micro_batch: MicroBatch, fetched: _Fetched, computed_tokens: int) -> MicroBatchLoss:
    metrics = dict(fetched.terms)
    loss, aux_loss = metrics.pop("loss"), metrics.pop("aux_loss")
    summed = MicroBatchLoss(loss, aux_loss, metrics=metrics, computed_tokens=computed_tokens)
    if fetched.routers is None:
        return summed
    share = _token_share(micro_batch)
    return replace(
        summed,
        router_entropy=fetched.routers.entropy * share,
        router_load_cv=fetched.routers.load_cv * share,
        tokens_per_expert=fetched.routers.tokens_per_expert,
    )


def _token_share(micro_batch: MicroBatch) -> float:
    return micro_batch.num_tokens / micro_batch.window.num_tokens
