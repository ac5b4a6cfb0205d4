"""The fused step: micro-batches of many jobs in one forward and one backward.

Axes: B rows of all jobs, L sequence, N labelled tokens, D hidden.

Rows are collated by job (`batch.py`). Logits exist at labels only. The sum of the jobs' losses is
differentiated at once; as no adapter's weights touch another's rows, each gets the gradient of its
own loss.

Gradients of several ranks are added up once a step, while the backward pass makes further ones.
They lie in one buffer, last layers first, about as a backward pass comes to them. It is cut into
buckets, and one is sent when it is complete and those before it are on their way. So all ranks send
the same buckets in the same order, also one whose backward pass fails half-way.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from loraloom.adapters.base import SampleTokens
from loraloom.adapters.method import Adapter
from loraloom.data.tokens import count_labels
from loraloom.generation.rows import collate, example_row, owners
from loraloom.models.host import Host
from loraloom.models.sharding import recovering
from loraloom.ranks import Ranks
from loraloom.routing.record import LayerRouting
from loraloom.routing.tally import measure_load, read_statistics
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, lay_out
from loraloom.training.step.objectives import ScoredSamples, ask_references

BUCKET_BYTES = 25 * 2**20
"""About as much as is sent at once; PyTorch's DistributedDataParallel takes as much."""

Weights = Sequence[Sequence[Parameter]]
"""The weights of several adapters."""


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
            inputs.input_ids,  # (B, L)
            None if layout.is_packed else inputs.attention_mask,
            adapters=layout.adapters,
            sample_keys=layout.sample_keys,
            sample_lengths=layout.sample_lengths,
            training=True,
        )
        states = inputs.predicting_states(output.last_hidden_state)  # (N, D)
        losses = host.token_losses(states, inputs.targets, owners(rows, layout.adapters))  # (N,)
        pieces = zip(
            layout.micro_batches,
            layout.split_losses(losses),
            layout.sample_tokens,
            layout.computed_tokens,
            strict=True,
        )
        shares = [
            _share(batch, own, output.routing.get(batch.adapter.name), samples, computed_tokens)
            for batch, own, samples, computed_tokens in pieces
        ]
        summing = summing_gradients(ranks, completed_weights(ranks, micro_batches))
    for share, micro_batch in zip(shares, micro_batches, strict=True):
        share.add_auxiliary_loss(micro_batch, ranks)
    reports = _fetch(micro_batches, shares, ranks)
    with ranks.together(), recovering(host.model), summing:
        finite = [
            _scaled(share.loss + share.aux_loss, micro_batch.loss_scale)
            for share, report, micro_batch in zip(shares, reports, micro_batches, strict=True)
            if math.isfinite(report.loss + report.aux_loss)
        ]
        if finite:
            torch.stack(finite).sum().backward()
    return reports


@dataclass
class _Share:
    """A rank's summands of what a micro-batch adds to its step.

    Args:
        loss: Of the objective.
        metrics: Of the objective.
        routing: Of its tokens; None without routers.
        samples: Whose tokens these are.
        computed_tokens: Of its rows, padding included.
        aux_loss: Of the routers, once `add_auxiliary_loss` has computed it.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    routing: list[LayerRouting] | None
    samples: Sequence[SampleTokens]
    computed_tokens: Tensor
    aux_loss: Tensor

    def add_auxiliary_loss(self, micro_batch: MicroBatch, ranks: Ranks) -> None:
        """Compute the summand of the router losses, which takes all ranks' counts of tokens."""
        if self.routing is None:
            return
        added = micro_batch.adapter.auxiliary_loss(self.routing, self.samples, ranks.sum)
        if added is not None:
            self.aux_loss = (added * micro_batch.token_share).to(self.loss.dtype)

    def scalars(self) -> list[Tensor]:
        return [self.loss, self.aux_loss, self.computed_tokens, *self.metrics.values()]


def _share(
    batch: MicroBatch,
    token_losses: Tensor,
    routing: list[LayerRouting] | None,
    samples: Sequence[SampleTokens],
    computed_tokens: int,
) -> _Share:
    references = None
    if batch.reference is not None:
        references = token_losses.new_tensor(batch.reference.of(batch.examples))
    scored = ScoredSamples(-token_losses, list(map(count_labels, batch.examples)), references)
    terms = batch.objective.terms(scored, batch.window.totals)
    loss, metrics = terms.loss, terms.metrics
    if not batch.counts:
        # The graph stays, as a sharded base needs the same backward pass on all ranks.
        loss, metrics = loss * 0, {name: value * 0 for name, value in metrics.items()}
        routing = None if routing is None else [record.emptied() for record in routing]
        samples, computed_tokens = [], 0
    tokens = loss.new_full((), computed_tokens)
    return _Share(loss, metrics, routing, samples, tokens, torch.zeros_like(loss))


def _fetch(
    micro_batches: Sequence[MicroBatch], shares: Sequence[_Share], ranks: Ranks
) -> list[MicroBatchLoss]:
    """Add all numbers of a round up over the ranks, and read them from the device at once."""
    scalars = torch.stack([value.detach() for share in shares for value in share.scalars()])
    loads = [torch.empty(0) if s.routing is None else measure_load(s.routing) for s in shares]
    summands = torch.cat([values.to(scalars.device).double() for values in (scalars, *loads)])
    numbers = iter(ranks.sum(summands).tolist())
    heads = [list(islice(numbers, len(share.scalars()))) for share in shares]
    reports = []
    for batch, share, head, load in zip(micro_batches, shares, heads, loads, strict=True):
        loss, aux_loss, tokens, *values = head
        metrics = dict(zip(share.metrics, values, strict=True))
        report = MicroBatchLoss(loss, aux_loss, metrics=metrics, computed_tokens=round(tokens))
        if share.routing is not None:
            routers = read_statistics(share.routing, list(islice(numbers, len(load))))
            report = replace(
                report,
                router_entropy=routers.entropy * batch.token_share,
                router_load_cv=routers.load_cv * batch.token_share,
                tokens_per_expert=routers.tokens_per_expert,
            )
        reports.append(report)
    return reports


def _scaled(loss: Tensor, scale: float) -> Tensor:
    return loss if scale == 1 else loss * scale


def completed_weights(ranks: Ranks, micro_batches: Sequence[MicroBatch]) -> list[list[Parameter]]:
    """Return, by adapter, the weights whose gradients these micro-batches complete, to add up."""
    if ranks.size == 1:
        return []
    return [
        [weight for weight in batch.adapter.parameters() if weight.requires_grad]
        for batch in micro_batches
        if batch.is_last
    ]


def sum_gradients(ranks: Ranks, weights: Weights) -> None:
    """Add up the gradients that are there; see `summing_gradients`."""
    if ranks.size == 1 or not weights:
        return
    with ranks.together():
        summing = summing_gradients(ranks, weights)
    with summing:
        pass


def summing_gradients(ranks: Ranks, weights: Weights) -> AbstractContextManager[None]:
    """Make a context for a backward pass, at whose end gradients are added up over all ranks.

    Earlier micro-batches' gradients are added too; their tensors stay as they are. A weight that no
    rank has a gradient of gets none. All memory is taken now.
    """
    return _GradientSum(ranks, weights) if weights else nullcontext()


class _GradientSum(AbstractContextManager[None]):
    def __init__(self, ranks: Ranks, weights: Weights):
        self._ranks = ranks
        # Last layers first, those of all adapters together.
        places = [(place / len(own), weight) for own in weights for place, weight in enumerate(own)]
        self._owners = [p for _, p in sorted(places, key=itemgetter(0), reverse=True)]
        sizes = [owner.numel() for owner in self._owners]
        buffer = self._owners[0].new_zeros(sum(sizes) + len(sizes))
        *self._pieces, self._counts = buffer.split([*sizes, len(sizes)])
        self._is_present = torch.zeros(len(sizes))
        self._bucket_of = [end * buffer.itemsize // BUCKET_BYTES for end in accumulate(sizes)]
        self._missing = Counter(self._bucket_of)
        lengths = Counter()
        for bucket, size in zip(self._bucket_of, sizes, strict=True):
            lengths[bucket] += size
        lengths[self._bucket_of[-1]] += len(sizes)
        self._missing[self._bucket_of[-1]] += 1  # the counts, which are known at the end
        self._unsent = deque(zip(lengths, buffer.split(list(lengths.values())), strict=True))
        self._waits: list[Callable[[], None]] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for place, (owner, piece) in enumerate(zip(self._owners, self._pieces, strict=True)):
            if owner.grad is not None:
                piece.view_as(owner).copy_(owner.grad)
                self._is_present[place] = 1
            owner.grad = piece.view_as(owner)
            hook = partial(self._note_complete, place)
            self._hooks.append(owner.register_post_accumulate_grad_hook(hook))

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None and not issubclass(kind, Exception):
            return  # the process ends
        # Also after an error: the other ranks wait for these buckets.
        self._counts.copy_(self._is_present)
        while self._unsent:
            self._send()
        for wait in self._waits:
            wait()
        if kind is None:
            for owner, count in zip(self._owners, self._counts.tolist(), strict=True):
                if not count:
                    owner.grad = None

    def _note_complete(self, place: int, _: Tensor) -> None:
        self._is_present[place] = 1
        self._missing[self._bucket_of[place]] -= 1
        # In lockstep layers of the base model travel now, and two streams might block each other.
        while not self._ranks.in_lockstep and not self._missing[self._unsent[0][0]]:
            self._send()

    def _send(self) -> None:
        _, bucket = self._unsent.popleft()
        self._waits.append(self._ranks.start_sum(bucket))


@contextmanager
def gradients_set_aside(adapters: Sequence[Adapter], completed: Weights = ()) -> Iterator[None]:
    """Add what backward passes give to the gradients that are there, but only if they end.

    They may fail half-way, so they get empty gradients; the others come back in any case.
    """
    before = {weight: weight.grad for adapter in adapters for weight in adapter.parameters()}
    apart = before.keys() - {weight for own in completed for weight in own}
    for weight in apart:
        weight.grad = None
    try:
        yield
    except BaseException:
        for weight, gradient in before.items():
            weight.grad = gradient
        raise
    for weight in apart:
        gradient = before[weight]
        if gradient is not None:
            weight.grad = gradient if weight.grad is None else gradient.add_(weight.grad)
