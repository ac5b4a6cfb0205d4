"""The fused step: micro-batches of many jobs in one forward and one backward.

Axes: B rows of all jobs, L sequence, N labelled tokens, D hidden.

Rows are collated by job. Logits exist at labels only. The sum of the jobs' losses is differentiated
at once; as no adapter's weights touch another's rows, each gets the gradient of its own loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loraloom.config.adapter import MixLoraConfig
from loraloom.data.examples import NO_LOSS, collate
from loraloom.models.host import Host
from loraloom.routing.losses import router_loss
from loraloom.routing.record import LayerRouting
from loraloom.routing.statistics import load_statistics
from loraloom.train.micro_batch import MicroBatch, MicroBatchLoss
from loraloom.train.window import count_labels


def forward_backward(
    host: Host, micro_batches: Sequence[MicroBatch], pad_id: int
) -> list[MicroBatchLoss]:
    """Add each micro-batch's gradient to its adapter's.

    A loss is the sum of token losses over the labels of the whole step, so that the gradient does
    not depend on how the step is cut. A loss that is not finite is left out of the backward pass;
    its adapter's gradient is of no use then.

    Args:
        host: In training mode.
        micro_batches: One of each job.
        pad_id: Token to pad with, on the right.

    Returns:
        The losses, in the order of the micro-batches.
    """
    batch = collate([example for part in micro_batches for example in part.examples], pad_id)
    output = host.hidden(
        batch.input_ids.to(host.device),
        batch.attention_mask.to(host.device),
        adapters=[part.adapter.name for part in micro_batches for _ in part.examples],
        sample_keys=[key for part in micro_batches for key in part.sample_keys],
    )
    losses = label_losses(host, output.last_hidden_state, batch.labels)
    counts = [sum(map(count_labels, part.examples)) for part in micro_batches]
    terms = [
        _loss_terms(part, part_losses, output.routing.get(part.adapter.name))
        for part, part_losses in zip(micro_batches, losses.split(counts), strict=True)
    ]
    values = torch.stack([torch.stack(pair) for pair in terms]).tolist()
    _backward(
        [pair[0] + pair[1] for pair, value in zip(terms, values, strict=True) if _is_finite(value)]
    )
    return [
        _with_statistics(part, loss, aux_loss, output.routing.get(part.adapter.name))
        for part, (loss, aux_loss) in zip(micro_batches, values, strict=True)
    ]


def label_losses(host: Host, hidden_states: Tensor, labels: Tensor) -> Tensor:
    """Compute -log p of every label, [N], row after row: state i predicts label i + 1.

    Args:
        host: Whose head is used.
        hidden_states: After the final norm, [B, L, D].
        labels: Tokens, or NO_LOSS, [B, L], on the CPU.
    """
    places = _predicting_places(labels).to(hidden_states.device)
    states = hidden_states.flatten(0, 1).index_select(0, places)  # (N, D)
    targets = labels[:, 1:][labels[:, 1:] != NO_LOSS].to(hidden_states.device)
    return host.token_losses(states, targets)


def _predicting_places(labels: Tensor) -> Tensor:
    """Return where in the flattened batch the states lie that predict a label, [N]."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != NO_LOSS
    return predicts.flatten().nonzero().squeeze(1)


def _loss_terms(
    part: MicroBatch, token_losses: Tensor, routing: list[LayerRouting] | None
) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's share of the step's loss and of its router loss."""
    loss = token_losses.sum() / max(part.window.num_labels, 1)
    config = part.adapter.config
    if routing is None or not isinstance(config, MixLoraConfig):
        return loss, torch.zeros_like(loss)
    return loss, (router_loss(routing, config) * _token_share(part)).to(loss.dtype)


def _is_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _backward(losses: Sequence[Tensor]) -> None:
    if losses:
        torch.stack(list(losses)).sum().backward()


def _with_statistics(
    part: MicroBatch, loss: float, aux_loss: float, routing: list[LayerRouting] | None
) -> MicroBatchLoss:
    if routing is None:
        return MicroBatchLoss(loss, aux_loss)
    statistics, share = load_statistics(routing), _token_share(part)
    return MicroBatchLoss(loss, aux_loss, statistics.entropy * share, statistics.load_cv * share)


def _token_share(part: MicroBatch) -> float:
    return part.num_tokens / part.window.num_tokens
