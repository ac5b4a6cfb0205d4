"""What losses on pairs of a chosen and a rejected answer share.

Axes: S samples, P pairs, S = 2P.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from loraloom.training.step.objectives.objective import ScoredSamples


def split_pairs(
    values: Float[Tensor, " S"],
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Return what belongs to the chosen answers, and what to the rejected."""
    return values[0::2], values[1::2]


def sigmoid_losses(margins: Float[Tensor, " P"], label_smoothing: float) -> Float[Tensor, " P"]:
    """Compute `-(1 - ε) log σ(margin) - ε log σ(-margin)`.

    Args:
        margins: Reward of the chosen less that of the rejected.
        label_smoothing: ε, the share of pairs that are taken to be the wrong way round.
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def pair_metrics(
    rewards: Float[Tensor, " S"], scored: ScoredSamples, num_pairs: int
) -> dict[str, Tensor]:
    """Compute shares of the means that trl reports under these names.

    Args:
        rewards: β × log p, or β × its difference to the reference's.
        scored: The samples.
        num_pairs: Of the whole step.
    """
    chosen, rejected = split_pairs(rewards.detach())
    chosen_log_probs, rejected_log_probs = split_pairs(scored.sums.detach())
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_log_probs,
        "logps/rejected": rejected_log_probs,
    }
    return {name: value.sum() / num_pairs for name, value in values.items()}
