from __future__ import annotations

import pytest
import torch

from loraloom.training.settings import CpoConfig, DpoConfig, SftConfig
from loraloom.training.step.objectives import ScoredSamples, StepTotals, build_objective

LOG_PROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25, -4.0], dtype=torch.float64)
NUM_LABELS = (2, 1, 1, 3)
REFERENCES = torch.tensor([-2.5, -1.0, -3.0, -5.0], dtype=torch.float64)
WHOLE = StepTotals(num_examples=2, num_labels=7, num_chosen_labels=3)


def scored() -> ScoredSamples:
    return ScoredSamples(LOG_PROBS, NUM_LABELS, REFERENCES)


def test_sft_is_the_mean_over_labels():
    terms = build_objective(SftConfig())(scored(), WHOLE)
    assert float(terms.loss) == pytest.approx(12.25 / 7)
    assert terms.metrics == {}


@pytest.mark.parametrize(
    "config",
    [DpoConfig(), DpoConfig(loss_type="ipo"), CpoConfig(), CpoConfig(loss_type="hinge")],
    ids=["dpo", "ipo", "cpo", "cpo-hinge"],
)
def test_shares_of_micro_batches_add_up(config):
    objective = build_objective(config)
    whole = objective(scored(), WHOLE)
    parts = [
        objective(ScoredSamples(LOG_PROBS[:3], NUM_LABELS[:2], REFERENCES[:2]), WHOLE),
        objective(ScoredSamples(LOG_PROBS[3:], NUM_LABELS[2:], REFERENCES[2:]), WHOLE),
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], value)


def test_an_answer_without_labels_has_log_probability_zero():
    empty = ScoredSamples(torch.zeros(0), (0, 0))
    assert empty.sums.tolist() == [0.0, 0.0]
    assert empty.lengths.tolist() == [1.0, 1.0]
