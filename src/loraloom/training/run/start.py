"""The training data that an adapter looks at before it starts.

Axes: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraloom.data.examples import NO_LOSS
from loraloom.data.training_set import TrainingSet
from loraloom.infer.rows import TokenRow, collate, example_row

_MOST_BATCHES = 64


def start_batches(
    training_set: TrainingSet, num_tokens: int, pad_id: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Give the first rows of an epoch in batches."""
    batches: list[list[TokenRow]] = [[]]
    for row in _rows(training_set):
        if sum(len(row.targets) for row in batches[-1]) >= num_tokens:
            if len(batches) == _MOST_BATCHES:
                break
            batches.append([])
        batches[-1].append(row)
    if len(batches) > 1 and sum(len(row.targets) for row in batches[-1]) < num_tokens:
        batches.pop()
    return [_batch(rows, pad_id, device) for rows in batches]


def _rows(training_set: TrainingSet) -> Iterator[TokenRow]:
    for index in training_set.epoch_order(0):
        yield from map(example_row, training_set.examples[index].rows)


def _batch(rows: list[TokenRow], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    inputs = collate(rows, torch.float32, device, pad_id)
    length = inputs.input_ids.shape[1]
    labels = torch.full((len(rows) * length,), NO_LOSS, device=device)
    labels[inputs.predictors + 1] = inputs.targets
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask.to(device),
        "labels": labels.view(len(rows), length),
    }
