"""What a job minimises, as a function of the log-probabilities of its labels.

Axes: N labels, S samples.

A sample is a row of the forward. Where examples are pairs of answers, samples alternate: a chosen
one, its rejected one, and so on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from loraloom.training.step.window import StepTotals


@dataclass(frozen=True)
class ScoredSamples:
    """The log-probabilities that samples have.

    Args:
        log_probs: log p of each label, [N], sample after sample; differentiable in training.
        num_labels: Of each sample.
        references: Each sample's log p, summed over its labels, under the reference policy, [S];
            None where the job has no reference.
    """

    log_probs: Tensor
    num_labels: Sequence[int]
    references: Tensor | None = None

    @property
    def by_sample(self) -> tuple[Tensor, ...]:
        """The log-probabilities of each sample's labels."""
        return self.log_probs.split(list(self.num_labels))

    @cached_property
    def sums(self) -> Tensor:
        """Each sample's log p, summed over its labels, [S]."""
        return torch.stack([log_probs.sum() for log_probs in self.by_sample])

    @property
    def lengths(self) -> Tensor:
        """Labels of each sample, at least 1, [S], in the dtype of log-probabilities."""
        return self.log_probs.new_tensor([max(count, 1) for count in self.num_labels])


@dataclass(frozen=True)
class ObjectiveTerms:
    """A micro-batch's share of its step's loss and metrics.

    Args:
        loss: A scalar.
        metrics: Scalars without a gradient, by their names in metrics.jsonl.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A loss whose shares add up: it does not depend on how a step is cut into micro-batches."""

    @abstractmethod
    def terms(self, scored: ScoredSamples, totals: StepTotals) -> ObjectiveTerms:
        """Compute the samples' share of the loss and the metrics of their whole step.

        Args:
            scored: Samples of one micro-batch.
            totals: What the step has in all its micro-batches.
        """
