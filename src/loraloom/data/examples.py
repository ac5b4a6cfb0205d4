"""What training and evaluation are made of: examples, choice questions and batches.

Axes: B batch, L sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NO_LOSS = -100
"""The label of a token that is read but not learnt."""


@dataclass(frozen=True)
class Example:
    """One tokenised training example.

    `labels[i]` is the token at i, or NO_LOSS; the shift by one is the trainer's. `sample_id` is the
    same in every epoch, whatever the order.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    sample_id: int

    @property
    def rows(self) -> tuple[Example, ...]:
        """The rows that it puts into a forward: itself."""
        return (self,)


@dataclass(frozen=True)
class PreferencePair:
    """Two tokenised answers to one prompt, each a row and a sample of its own.

    Args:
        chosen: The prompt with the better answer, which has the labels.
        rejected: With the worse one.
    """

    chosen: Example
    rejected: Example

    @property
    def rows(self) -> tuple[Example, ...]:
        """The rows that it puts into a forward: the chosen, then the rejected."""
        return (self.chosen, self.rejected)


TrainingExample = Example | PreferencePair
"""What a batch is counted in."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question whose answer is the choice with the highest log-likelihood over its normalizer.

    The three tuples `contexts`, `continuations` and `normalizers` have one entry for each choice. A
    continuation includes its leading delimiter; a normalizer divides the summed log-likelihood of
    that continuation (1 compares sums, the number of characters compares averages).
    """

    task: str
    index: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int
    normalizers: tuple[float, ...]
    group: str | None = None


@dataclass(frozen=True)
class Batch:
    """Examples padded to one length."""

    input_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L), 1 on real tokens
    labels: Tensor  # (B, L), NO_LOSS on padding
    sample_ids: tuple[int, ...]


def collate(
    examples: Sequence[Example], pad_id: int, side: Literal["left", "right"] = "right"
) -> Batch:
    """Pad examples to the longest one.

    Args:
        examples: At least one.
        pad_id: Token to fill up with; it is masked out and has no loss.
        side: Where the padding goes.
    """
    length = max(len(example.input_ids) for example in examples)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([_pad(row, length, fill, side) for row in rows], dtype=torch.long)

    return Batch(
        input_ids=padded([example.input_ids for example in examples], pad_id),
        attention_mask=padded([[1] * len(example.input_ids) for example in examples], 0),
        labels=padded([example.labels for example in examples], NO_LOSS),
        sample_ids=tuple(example.sample_id for example in examples),
    )


def _pad(row: Sequence[int], length: int, fill: int, side: Literal["left", "right"]) -> list[int]:
    padding = [fill] * (length - len(row))
    return [*padding, *row] if side == "left" else [*row, *padding]
