"""Contrastive preference optimisation: a margin without a reference, and the chosen's likelihood.

Axes: S samples, P pairs, S = 2P.
"""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from loraloom.config.objective import CpoConfig
from loraloom.training.step.objectives.objective import Objective, ObjectiveTerms, ScoredSamples
from loraloom.training.step.objectives.pairwise import pair_metrics, sigmoid_losses, split_pairs
from loraloom.training.step.window import StepTotals


@final
class Cpo(Objective):
    """The mean over pairs of a loss of β(log π(chosen) - log π(rejected)), and α × NLL.

    sigmoid: `-log σ(margin)`, smoothed; hinge: `max(0, 1 - margin)`. NLL is the mean of -log p over
    all labels of the step's chosen answers.

    Args:
        config: Loss, β, label smoothing, and the weight α of the NLL.

    Source:
        Xu et al. 2024, arXiv:2401.08417, eq. 5; hinge as in m-LoRA 0.2 and trl 1.16 `CPOTrainer`.
    """

    def __init__(self, config: CpoConfig):
        self.config = config

    def terms(self, scored: ScoredSamples, totals: StepTotals) -> ObjectiveTerms:
        """Compute the share of the means over pairs and over labels."""
        chosen, rejected = split_pairs(scored.sums)
        losses = self._losses(self.config.beta * (chosen - rejected))
        nll = -chosen.sum() / max(totals.num_chosen_labels, 1)
        loss = losses.sum() / totals.num_examples + self.config.cpo_alpha * nll
        metrics = pair_metrics(self.config.beta * scored.sums, scored, totals.num_examples)
        return ObjectiveTerms(loss, {**metrics, "nll_loss": nll.detach()})

    def _losses(self, margins: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        if self.config.loss_type == "hinge":
            return (1 - margins).relu()
        return sigmoid_losses(margins, self.config.label_smoothing)
