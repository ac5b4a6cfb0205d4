"""The fused step: micro-batches of many jobs in one forward and one backward.

Axes: B rows of all jobs, L sequence, N labelled tokens, D hidden.

Rows are collated by job (`rows.py`). Logits exist at labels only. The sum of the jobs' losses is
differentiated at once; as no adapter's weights touch another's rows, each gets the gradient of its
own loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from loraloom.adapters.adapter import SampleTokens
from loraloom.data.examples import count_labels
from loraloom.generation.rows import collate, example_row, owners
from loraloom.models.host import Host
from loraloom.models.sharding import recovering
from loraloom.ranks import Ranks
from loraloom.routing.record import LayerRouting
from loraloom.routing.tally import RouterStatistics, measure_load, read_statistics
from loraloom.training.step.gradient_sum import completed_weights, summing_gradients
from loraloom.training.step.micro_batch import MicroBatch, MicroBatchLoss
from loraloom.training.step.objectives import ObjectiveTerms, ScoredSamples, ask_references
from loraloom.training.step.rows import RowLayout, lay_out


def forward_backward(
    host: Host, micro_batches: Sequence[MicroBatch], pad_id: int
) -> list[MicroBatchLoss]:
    """Add each micro-batch's gradient to its adapter's.

    A loss is the micro-batch's share of its objective over the whole step, so that the gradient
    does not depend on how the step is cut. A loss that is not finite is left out of the backward
    pass; its adapter's gradient is of no use then. Gradients are those of losses times their scale.

    Where the host has several ranks, each computes its share of the rows and gets its summand of
    the gradient; after a step's last micro-batch, all get the sum. Losses are those of all.
    """
    ranks = host.ranks
    ask_references(host, [(batch.reference, batch.examples) for batch in micro_batches])
    layout = lay_out([batch.share(ranks.rank, ranks.size) for batch in micro_batches])
    rows = [example_row(example) for example in layout.joined()]
    with ranks.together():
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
        losses = host.token_losses(states, inputs.targets, owners(rows, layout.adapters))
        forwards = _forwards(layout, losses, output.routing)
        summing = summing_gradients(ranks, completed_weights(ranks, micro_batches))
    terms = [
        forward.with_auxiliary_loss(micro_batch, ranks)
        for forward, micro_batch in zip(forwards, micro_batches, strict=True)
    ]
    values = _fetch(terms, [forward.routing for forward in forwards], ranks)
    with ranks.together(), recovering(host.model), summing:
        finite = [
            _scaled(term["loss"] + term["aux_loss"], micro_batch.loss_scale)
            for term, fetched, micro_batch in zip(terms, values, micro_batches, strict=True)
            if math.isfinite(fetched.terms["loss"] + fetched.terms["aux_loss"])
        ]
        if finite:
            torch.stack(finite).sum().backward()
    return [_report(*pair) for pair in zip(micro_batches, values, strict=True)]


_METRIC = "metrics/"
"""Before the names of an objective's own numbers, which anybody may give."""


@dataclass(frozen=True)
class _Forward:
    """What a rank's share of a micro-batch gave.

    Args:
        terms: Its summands of the step's loss and metrics.
        routing: Of its tokens; None without routers.
        samples: Whose tokens these are.
        computed_tokens: Of its rows, padding included.
    """

    terms: ObjectiveTerms
    routing: list[LayerRouting] | None
    samples: Sequence[SampleTokens]
    computed_tokens: int

    def with_auxiliary_loss(self, micro_batch: MicroBatch, ranks: Ranks) -> dict[str, Tensor]:
        """Name all summands; that of the router losses takes everybody's counts."""
        loss = self.terms.loss
        aux_loss, added = torch.zeros_like(loss), None
        if self.routing is not None:
            added = micro_batch.adapter.auxiliary_loss(self.routing, self.samples, ranks.sum)
        if added is not None:
            aux_loss = (added * _token_share(micro_batch)).to(loss.dtype)
        tokens = loss.new_full((), self.computed_tokens)
        metrics = {f"{_METRIC}{name}": value for name, value in self.terms.metrics.items()}
        return {"loss": loss, "aux_loss": aux_loss, "computed_tokens": tokens, **metrics}

    def uncounted(self) -> _Forward:
        """Keep the graph, but let nothing come of it."""
        metrics = {name: value * 0 for name, value in self.terms.metrics.items()}
        routing = None if self.routing is None else [record.emptied() for record in self.routing]
        return _Forward(ObjectiveTerms(self.terms.loss * 0, metrics), routing, [], 0)


def _forwards(
    layout: RowLayout, losses: Tensor, routing: Mapping[str, list[LayerRouting]]
) -> list[_Forward]:
    """Cut what a forward gave by the shares in it."""
    pieces = zip(
        layout.micro_batches,
        layout.split_losses(losses),
        layout.sample_tokens,
        layout.computed_tokens,
        strict=True,
    )
    forwards = []
    for share, own, samples, computed_tokens in pieces:
        terms = share.objective.terms(_scored(share, own), share.window.totals)
        forward = _Forward(terms, routing.get(share.adapter.name), samples, computed_tokens)
        forwards.append(forward if share.counts else forward.uncounted())
    return forwards


@dataclass(frozen=True)
class _Fetched:
    """A micro-batch's numbers, read from the device."""

    terms: dict[str, float]
    routers: RouterStatistics | None


def _scored(micro_batch: MicroBatch, token_losses: Tensor) -> ScoredSamples:
    references = None
    if micro_batch.reference is not None:
        references = token_losses.new_tensor(micro_batch.reference.of(micro_batch.examples))
    return ScoredSamples(-token_losses, list(map(count_labels, micro_batch.examples)), references)


def _fetch(
    terms: Sequence[dict[str, Tensor]],
    routing: Sequence[list[LayerRouting] | None],
    ranks: Ranks,
) -> list[_Fetched]:
    """Add all numbers of a round up over the ranks, and read them from the device at once."""
    scalars = torch.stack([value.detach() for term in terms for value in term.values()])
    loads = [torch.empty(0) if record is None else measure_load(record) for record in routing]
    summands = torch.cat([values.to(scalars.device).double() for values in (scalars, *loads)])
    numbers = iter(ranks.sum(summands).tolist())
    named = [{name: next(numbers) for name in term} for term in terms]
    return [
        _Fetched(
            own,
            None if record is None else read_statistics(record, list(islice(numbers, len(load)))),
        )
        for own, record, load in zip(named, routing, loads, strict=True)
    ]


def _scaled(loss: Tensor, scale: float) -> Tensor:
    return loss if scale == 1 else loss * scale


def _report(micro_batch: MicroBatch, fetched: _Fetched) -> MicroBatchLoss:
    terms = dict(fetched.terms)
    loss, aux_loss = terms.pop("loss"), terms.pop("aux_loss")
    computed_tokens = round(terms.pop("computed_tokens"))
    metrics = {name.removeprefix(_METRIC): value for name, value in terms.items()}
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
