"""Supervised fine-tuning: the mean of -log p over a step's labels."""

from __future__ import annotations

from typing import final

from loraloom.training.step.objectives.objective import Objective, ObjectiveTerms, ScoredSamples
from loraloom.training.step.window import StepTotals


@final
class Sft(Objective):
    """`-Σ log p / labels of the step`."""

    def terms(self, scored: ScoredSamples, totals: StepTotals) -> ObjectiveTerms:
        """Compute the share of the mean over labels."""
        return ObjectiveTerms(-scored.log_probs.sum() / max(totals.num_labels, 1))
