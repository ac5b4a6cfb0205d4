"""Direct preference optimisation against a reference policy, by DPO's loss or IPO's.

Axes: S samples, P pairs, S = 2P.
"""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor

from loraloom.config.objective import DpoConfig
from loraloom.training.step.objectives.objective import Objective, ObjectiveTerms, ScoredSamples
from loraloom.training.step.objectives.pairwise import pair_metrics, sigmoid_losses, split_pairs
from loraloom.training.step.window import StepTotals


@final
class Dpo(Objective):
    """The mean over pairs of a loss of Δ = log(π/π_ref)(chosen) - log(π/π_ref)(rejected).

    sigmoid: `-log σ(βΔ)`, smoothed. ipo: `(Δ' - 1/(2β))²`, Δ' of log-ratios per label.

    Args:
        config: Loss, β and label smoothing.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Azar et al. 2023, arXiv:2310.12036, eq. 17,
        with lengths divided out as trl 1.16 `DPOTrainer` does on the authors' word.
    """

    def __init__(self, config: DpoConfig):
        self.config = config

    def terms(self, scored: ScoredSamples, totals: StepTotals) -> ObjectiveTerms:
        """Compute the share of the mean over pairs."""
        assert scored.references is not None, "a DPO job has a reference"
        log_ratios = scored.sums - scored.references
        losses = self._losses(log_ratios, scored.lengths)
        metrics = pair_metrics(self.config.beta * log_ratios, scored, totals.num_examples)
        return ObjectiveTerms(losses.sum() / totals.num_examples, metrics)

    def _losses(
        self, log_ratios: Float[Tensor, " S"], lengths: Float[Tensor, " S"]
    ) -> Float[Tensor, " P"]:
        beta = self.config.beta
        if self.config.loss_type == "ipo":
            chosen, rejected = split_pairs(log_ratios / lengths)
            return (chosen - rejected - 1 / (2 * beta)).square()
        chosen, rejected = split_pairs(log_ratios)
        return sigmoid_losses(beta * (chosen - rejected), self.config.label_smoothing)
