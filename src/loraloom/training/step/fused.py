"""The fused step: micro-batches of many jobs in one forward and one backward.

The sum of the jobs' losses is differentiated at once: as no adapter's weights touch another's rows,
each gets the gradient of its own. Axes: B rows of all jobs, L sequence, N labels, D hidden.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Adapter
from loraloom.adapters.segment import SampleTokens
from loraloom.base.sharding import recovering
from loraloom.data.tokens import join_samples
from loraloom.distributed import Ranks
from loraloom.generation.scoring import collate, example_row, owners
from loraloom.host.host import Host
from loraloom.routing.record import LayerRouting
from loraloom.routing.tally import RoutingTotals, sum_extra, widened
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, RowLayout, Rows, lay_out
from loraloom.training.step.objectives import (
    has_fixed_metrics,
    score_references,
    scored_samples,
)


@dataclass
class UnreadLoss:
    """A micro-batch's loss on the device, for which the host has not waited yet."""

    summands: Tensor  # of this rank: loss, router losses, tokens, metrics, sums of routers
    metric_names: Sequence[str]
    routers: RoutingTotals | None  # of this rank
    token_share: float
    grad_norm: Tensor  # of the adapter; 0 until the step's gradient is complete

    def report(self, grad_norm: float, sums: Iterable[float]) -> MicroBatchLoss:
        """Make the report of all ranks' summands, added up."""
        loss, aux_loss, tokens, *values = sums
        metrics = dict(zip(self.metric_names, values, strict=False))  # those of routers come last
        report = MicroBatchLoss(
            loss, aux_loss, metrics=metrics, computed_tokens=round(tokens), grad_norm=grad_norm
        )
        if self.routers is None:
            return report
        routing_sums = torch.tensor(values[len(metrics) :], dtype=torch.float64)
        routers = replace(self.routers, sums=routing_sums.view_as(self.routers.sums))
        return replace(
            report,
            router_entropy=routers.entropy * self.token_share,
            router_load_cv=routers.load_cv * self.token_share,
            tokens_per_expert=routers.choices,
        )


# Losses of forwards, each with the index of what it is a part of.
Pending = list[tuple[int, UnreadLoss]]


def add_gradients(host: Host, micro_batches: Sequence[MicroBatch], pad_id: int) -> list[UnreadLoss]:
    """Add each micro-batch's gradient, times its loss's scale, to its adapter's."""
    # A loss is a share of the objective over the whole step: the cut changes no gradient. Each rank
    # computes its share of the rows and a summand, for `sum_gradient`; losses are those of all.
    ranks = host.ranks
    score_references(host, [(batch.reference, batch.examples) for batch in micro_batches])
    layout = lay_out([batch.share(ranks.rank, ranks.size) for batch in micro_batches])
    with ranks.together():
        shares = _forward(host, layout, pad_id)
    for share, batch in zip(shares, micro_batches, strict=True):
        if share.routing is None:
            continue
        # It takes all ranks' counts of tokens.
        added = batch.adapter.config.auxiliary_loss(share.routing, share.samples, ranks.sum)
        if added is not None:
            share.aux_loss = (added * batch.token_share).to(share.loss.dtype)
    if ranks.size > 1 and not all(has_fixed_metrics(batch.objective) for batch in micro_batches):
        _share_metric_names(shares, ranks)
    unread = []
    scaled = []
    for share, batch in zip(shares, micro_batches, strict=True):
        unread.append(share.unread(batch.token_share))
        scaled.append((share.loss + share.aux_loss) * batch.loss_scale)
    with ranks.together(), recovering(host.model):
        losses = torch.stack(scaled)
        # One that is not finite makes no gradient of use; the host does not wait to learn which.
        losses.masked_fill(~losses.isfinite(), 0).sum().backward()
    return unread


def read_losses(ranks: Ranks, pending: Pending, num_totals: int) -> list[MicroBatchLoss]:
    """Add losses up by index and over the ranks, and read them all from the device at once."""
    totals = [MicroBatchLoss(0.0)] * num_totals
    if not pending:
        return totals
    sums = ranks.sum(torch.cat([loss.summands for _, loss in pending]))
    norms = torch.stack([loss.grad_norm for _, loss in pending])
    numbers = iter(torch.cat([norms, sums]).tolist())
    grad_norms = list(islice(numbers, len(pending)))
    for (index, loss), grad_norm in zip(pending, grad_norms, strict=True):
        totals[index] += loss.report(grad_norm, islice(numbers, len(loss.summands)))
    return totals


@dataclass
class _Share:
    """A rank's summands of what a micro-batch adds to its step."""

    loss: Tensor
    metrics: Mapping[str, Tensor]
    routing: list[LayerRouting] | None
    samples: Sequence[SampleTokens]
    computed_tokens: Tensor
    aux_loss: Tensor  # zero until all ranks' routers are known

    def unread(self, token_share: float) -> UnreadLoss:
        values = [self.loss, self.aux_loss, self.computed_tokens, *self.metrics.values()]
        summands = widened(torch.stack(values).detach())
        routers = None
        if self.routing is not None:
            routers = RoutingTotals.of(self.routing)
            summands = torch.cat([summands, routers.sums.flatten()])
        no_norm = summands.new_zeros(())
        return UnreadLoss(summands, list(self.metrics), routers, token_share, no_norm)


def _forward(host: Host, layout: RowLayout, pad_id: int) -> list[_Share]:
    inputs_of_rows = [example_row(join_samples(samples)) for samples in layout.samples]
    adapters = [batch.adapter.name for batch, _ in layout.flat]
    adapters_of_labels = owners(inputs_of_rows, adapters)
    inputs = collate(inputs_of_rows, host.dtype, host.device, pad_id)
    lengths = None
    if any(len(samples) > 1 for samples in layout.samples):
        lengths = [[len(sample.input_ids) for sample in samples] for samples in layout.samples]
    output = host.hidden(
        inputs.input_ids,  # (B, L)
        inputs.attention_mask,
        adapters=adapters,
        sample_keys=[batch.sample_keys[index] for batch, row in layout.flat for index in row],
        sample_lengths=lengths,
        training=True,
    )
    states = inputs.predicting_states(output.last_hidden_state)  # (N, D)
    losses = host.token_losses(states, inputs.targets, adapters_of_labels)  # (N,)
    split_losses = layout.split_losses(losses)
    num_tokens = layout.computed_tokens
    shares = []
    for index, batch in enumerate(layout.micro_batches):
        routing = output.routing.get(batch.adapter.name)
        rows = layout.rows[index]
        shares.append(_share(batch, split_losses[index], rows, routing, num_tokens[index]))
    return shares


def _share(
    batch: MicroBatch,
    token_losses: Tensor,
    rows: Rows,
    routing: list[LayerRouting] | None,
    computed_tokens: int,
) -> _Share:
    scored = scored_samples(-token_losses, batch.examples, batch.reference)
    loss, metrics = batch.objective(scored, batch.window.totals)
    metrics = dict(metrics)
    in_rows = [batch.examples[index] for row in rows for index in row]
    samples = [SampleTokens(len(sample.input_ids), sample.expert_group) for sample in in_rows]
    if not batch.counts:
        # The graph stays, as a sharded base needs the same backward pass on all ranks.
        loss = loss * 0
        metrics = {name: value * 0 for name, value in metrics.items()}
        if routing is not None:
            routing = [record.emptied() for record in routing]
        samples = []
        computed_tokens = 0
    for name, total in sum_extra(routing or ()).items():
        metrics[f"router/{name}"] = (total / batch.window.num_tokens).to(loss)
    num_computed = loss.new_full((), computed_tokens)
    return _Share(loss, metrics, routing, samples, num_computed, aux_loss=torch.zeros_like(loss))


def _share_metric_names(shares: Sequence[_Share], ranks: Ranks) -> None:
    """Give each share the metrics that it has on any rank: elsewhere they add nothing."""
    by_rank = ranks.gather([list(share.metrics) for share in shares])
    for share, *names in zip(shares, *by_rank, strict=True):
        zero = torch.zeros_like(share.aux_loss)
        all_names = dict.fromkeys(chain(*names))
        share.metrics = {name: share.metrics.get(name, zero) for name in all_names}


def sum_gradient(ranks: Ranks, adapter: nn.Module) -> None:
    if ranks.size == 1:
        return
    # A weight that no rank has a gradient of gets none, as an optimizer takes a zero for one.
    weights = [weight for weight in adapter.parameters() if weight.requires_grad]
    with ranks.together():
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        counts = weights[0].new_tensor([float(w.grad is not None) for w in weights])
        buffer = torch.cat([*(gradient.flatten() for gradient in gradients), counts])
    ranks.add_up(buffer)
    sizes = [weight.numel() for weight in weights]
    *sums, counts = buffer.split([*sizes, len(weights)])
    for weight, gradient, count in zip(weights, sums, counts.tolist(), strict=True):
        weight.grad = gradient.view_as(weight) if count else None


@contextmanager
def gradients_set_aside(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Add what backward passes give to the gradients that are there, but only if they end."""
    # They may fail half-way, so they get empty gradients.
    before = {weight: weight.grad for adapter in adapters for weight in adapter.parameters()}
    for weight in before:
        weight.grad = None
    try:
        yield
    except BaseException:
        for weight, gradient in before.items():
            weight.grad = gradient
        raise
    for weight, gradient in before.items():
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)
