from typing import Literal

import numpy
import pytest
import torch

import loraloom
from loraloom.errors import ConfigError, TrainingError
from loraloom.training.settings import ObjectiveConfig, RunConfig, SftConfig
from loraloom.training.step.objectives import ScoredSamples, StepTotals, build_objective
from tests.adapters.test_registered_methods import run_settings

LOG_PROBS = torch.tensor([-1.0, -2.0, -0.5, -3.0, -1.5, -0.25, -4.0], dtype=torch.float64)
NUM_LABELS = (2, 1, 1, 3)
REFERENCES = torch.tensor([-2.5, -1.0, -3.0, -5.0], dtype=torch.float64)
WHOLE = StepTotals(num_examples=2, num_labels=7, num_chosen_labels=3)


def scored() -> ScoredSamples:
    return ScoredSamples(LOG_PROBS, NUM_LABELS, REFERENCES)


def test_an_answer_without_labels_has_log_probability_zero():
    empty = ScoredSamples(torch.zeros(0), (0, 0))
    assert empty.sums.tolist() == [0.0, 0.0]
    assert empty.lengths.tolist() == [1.0, 1.0]


class FocalConfig(ObjectiveConfig):
    """An objective of another package."""

    name: Literal["focal"] = "focal"
    gamma: float = 2.0

    def terms(self, scored, totals):
        weights = (1 - scored.log_probs.exp()) ** self.gamma
        loss = -(weights * scored.log_probs).sum() / totals.num_labels
        return loss, {"weight": weights.sum().item() / totals.num_labels}


def test_a_registered_objective_is_one_of_run_files(methods_as_before):
    settings = run_settings(objective="focal")
    with pytest.raises(ValueError, match="'sft', 'dpo', 'cpo'"):
        RunConfig.model_validate(settings)
    assert loraloom.register_objective(FocalConfig) is FocalConfig
    run = RunConfig.model_validate(settings)
    assert RunConfig.model_validate(run.model_dump()) == run
    train = run.jobs[0].train
    assert isinstance(train.objective, FocalConfig)
    assert not train.objective.learns_from_pairs
    loss, metrics = build_objective(train.objective)(scored(), WHOLE)
    torch.testing.assert_close(loss, -((1 - LOG_PROBS.exp()) ** 2 * LOG_PROBS).sum() / 7)
    assert metrics.keys() == {"weight"}
    again = type("FocalConfig", (FocalConfig,), {"__doc__": "New.", "__module__": __name__})
    loraloom.register_objective(again)  # a notebook's cell that runs once more
    assert type(RunConfig.model_validate(settings).jobs[0].train.objective) is again


@pytest.mark.parametrize(
    "value", [2, 2.0, True, torch.tensor(2), torch.ones(1, 1), numpy.float32(2), numpy.ones(1)]
)
def test_metrics_of_a_registered_objective_may_be_any_single_number(value):
    def terms(self, scored, totals):
        return scored.log_probs.sum().reshape(1), {"size": value}

    config = type("Config", (ObjectiveConfig,), {"__module__": __name__, "terms": terms})
    loss, metrics = build_objective(config(name="mine"))(scored(), WHOLE)
    assert loss.shape == metrics["size"].shape == ()
    assert metrics["size"].dtype == loss.dtype
    assert float(metrics["size"]) == torch.as_tensor(value).item()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda p: (p.sum(), {"weights": p}), r"got a tensor of shape \(7,\).* for 'weights'"),
        (lambda p: (p.sum(), {"weights": "7"}), "got '7' for 'weights'"),
        (lambda p: (p.sum(), {"weights": [1.0, 2.0]}), "for 'weights'"),
        (lambda p: (p.sum(), {"weights": 1j}), "for 'weights'"),
        (lambda p: (p.sum(), {"weights": None}), "got None for 'weights'"),
        (lambda p: (p.sum(), {3: 1.0}), "got 1.0 for 3"),
        (lambda p: (p, {}), r"the loss as a tensor with one number, got a tensor of shape \(7,\)"),
        (lambda p: (1.0, {}), "the loss as a tensor with one number, got 1.0"),
        (lambda p: p.sum(), r"a pair \(loss, metrics\)"),
        (lambda p: (p.sum(), [1.0]), r"a pair \(loss, metrics\)"),
        (lambda p: (p.detach().sum(), {}), "one without a gradient"),
    ],
)
def test_what_is_no_single_number_is_named(returned, message):
    def terms(self, scored, totals):
        return returned(scored.log_probs)

    config = type("Config", (ObjectiveConfig,), {"__module__": __name__, "terms": terms})
    samples = ScoredSamples(LOG_PROBS.clone().requires_grad_(), NUM_LABELS)
    with pytest.raises(TrainingError, match=f"objective 'mine' must .*{message}"):
        build_objective(config(name="mine"))(samples, WHOLE)


def test_an_objective_without_terms_or_with_a_taken_name_is_refused():
    fields = {"__doc__": "A twin.", "terms": FocalConfig.terms}
    for faulty in (ObjectiveConfig, type("Twin", (SftConfig,), fields)):
        with pytest.raises(ConfigError, match=r"must have terms\(\) and name: .* sft, dpo, cpo"):
            loraloom.register_objective(faulty)
