from __future__ import annotations

import math

import pytest
import torch

from loraloom.training.settings import CpoConfig, DpoConfig, SftConfig
from loraloom.training.step.objectives import ScoredSamples, build_objective
from loraloom.training.step.window import StepTotals

LOG_PROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25, -4.0], dtype=torch.float64)
NUM_LABELS = (2, 1, 1, 3)
REFERENCES = torch.tensor([-2.5, -1.0, -3.0, -5.0], dtype=torch.float64)
WHOLE = StepTotals(num_examples=2, num_labels=7, num_chosen_labels=3)


def scored() -> ScoredSamples:
    return ScoredSamples(LOG_PROBS, NUM_LABELS, REFERENCES)


def sigmoid_loss(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def test_sft_is_the_mean_over_labels():
    terms = build_objective(SftConfig()).terms(scored(), WHOLE)
    assert float(terms.loss) == pytest.approx(12.25 / 7)
    assert terms.metrics == {}


def test_dpo_compares_log_ratios():
    # sums -3, -0.5, -3, -5.75; less the references: -0.5, 0.5, 0, -0.75
    terms = build_objective(DpoConfig(beta=2.0)).terms(scored(), WHOLE)
    expected = (sigmoid_loss(2 * -1.0) + sigmoid_loss(2 * 0.75)) / 2
    assert float(terms.loss) == pytest.approx(expected)
    assert {name: float(value) for name, value in terms.metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 2 * -0.25,
            "rewards/rejected": 2 * -0.125,
            "rewards/accuracies": 0.5,
            "rewards/margins": 2 * -0.125,
            "logps/chosen": -3.0,
            "logps/rejected": -3.125,
        }
    )


def test_ipo_divides_log_ratios_by_their_labels():
    terms = build_objective(DpoConfig(loss_type="ipo", beta=0.5)).terms(scored(), WHOLE)
    expected = ((-0.25 - 0.5 - 1) ** 2 + (0 + 0.25 - 1) ** 2) / 2
    assert float(terms.loss) == pytest.approx(expected)


def test_label_smoothing_takes_some_pairs_the_wrong_way_round():
    terms = build_objective(DpoConfig(beta=1.0, label_smoothing=0.1)).terms(scored(), WHOLE)
    losses = [0.9 * sigmoid_loss(m) + 0.1 * sigmoid_loss(-m) for m in (-1.0, 0.75)]
    assert float(terms.loss) == pytest.approx(sum(losses) / 2)


def test_cpo_adds_the_likelihood_of_the_chosen():
    terms = build_objective(CpoConfig(loss_type="hinge", beta=1.0, cpo_alpha=0.5))
    value = terms.terms(scored(), WHOLE)
    assert float(value.metrics["nll_loss"]) == pytest.approx(6 / 3)
    assert float(value.loss) == pytest.approx((max(0, 1 + 2.5) + max(0, 1 - 2.75)) / 2 + 0.5 * 2)


@pytest.mark.parametrize(
    "config",
    [DpoConfig(), DpoConfig(loss_type="ipo"), CpoConfig(), CpoConfig(loss_type="hinge")],
    ids=["dpo", "ipo", "cpo", "cpo-hinge"],
)
def test_shares_of_micro_batches_add_up(config):
    objective = build_objective(config)
    whole = objective.terms(scored(), WHOLE)
    parts = [
        objective.terms(ScoredSamples(LOG_PROBS[:3], NUM_LABELS[:2], REFERENCES[:2]), WHOLE),
        objective.terms(ScoredSamples(LOG_PROBS[3:], NUM_LABELS[2:], REFERENCES[2:]), WHOLE),
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value)


def test_an_answer_without_labels_has_log_probability_zero():
    empty = ScoredSamples(torch.zeros(0), (0, 0))
    assert empty.sums.tolist() == [0.0, 0.0]
    assert empty.lengths.tolist() == [1.0, 1.0]
