"""Log-probabilities of labels.

Axes: B batch, L sequence, N labels, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from loraloom.data.examples import NO_LOSS, Example, collate
from loraloom.halving import in_halves
from loraloom.models.host import Host
from loraloom.training.step.window import count_labels

MAX_TOKENS_PER_BATCH = 4096

Row = tuple[str | None, Example]
"""An adapter's name, or None for the base model, and what it reads."""


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


def label_log_probs(host: Host, rows: Sequence[Row], pad_id: int) -> list[Tensor]:
    """Compute log p of the labels of each row, without gradients, dropout and jitter.

    Args:
        host: In either mode, in which it is left.
        rows: In any order; they are batched by length.
        pad_id: Token to pad with.

    Returns:
        A tensor for each row in their order, [N], float64 on the CPU.

    Raises:
        DataError: If a row alone doesn't fit into memory.
    """
    log_probs: dict[int, Tensor] = {}
    with evaluating(host):
        for places in _batches(rows):
            batch = [rows[place] for place in places]
            parts = in_halves(partial(_batch_log_probs, host, pad_id), batch, _describe)
            log_probs.update(zip(places, parts, strict=True))
    return [log_probs[place] for place in range(len(rows))]


@torch.no_grad()
def _batch_log_probs(host: Host, pad_id: int, rows: Sequence[Row]) -> list[Tensor]:
    batch = collate([example for _, example in rows], pad_id)
    output = host.hidden(
        batch.input_ids.to(host.device),
        batch.attention_mask.to(host.device),
        [name for name, _ in rows],
    )
    losses = label_losses(host, output.last_hidden_state, batch.labels)
    counts = [count_labels(example) for _, example in rows]
    return list((-losses.double()).cpu().split(counts))


def _describe(row: Row) -> str:
    return f"a row of {len(row[1].input_ids)} tokens to be scored"


@contextmanager
def evaluating(host: Host) -> Iterator[None]:
    """Switch dropout and jitter off for a while."""
    training = host.training
    host.eval()
    try:
        yield
    finally:
        host.train(training)


def _batches(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Cut rows into batches of like lengths, each adapter's rows together; yield their places."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place][1].input_ids)):
        longest = len(rows[(batch or [place])[0]][1].input_ids)
        if batch and longest * (len(batch) + 1) > MAX_TOKENS_PER_BATCH:
            yield sorted(batch, key=lambda place: rows[place][0] or "")
            batch = []
        batch.append(place)
    if batch:
        yield sorted(batch, key=lambda place: rows[place][0] or "")


def _predicting_places(labels: Tensor) -> Tensor:
    """Return where in the flattened batch the states lie that predict a label, [N]."""
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != NO_LOSS
    return predicts.flatten().nonzero().squeeze(1)
