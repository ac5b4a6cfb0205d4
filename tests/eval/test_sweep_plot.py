from __future__ import annotations

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from loraloom.eval.sweep_plot import plot_sweep

NAMES = [f"lr-00{number}" for number in range(6)]
DISTRIBUTIONS = {
    "train.learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "adapter.method": CategoricalDistribution(['"lora"', '"mixlora"']),
}


def study_of(curves: list[dict[int, float]]) -> optuna.Study:
    """Trials that depend on the rate alone; every second one was stopped."""
    study = optuna.create_study(direction="minimize")
    for number, curve in enumerate(curves):
        params = {
            "train.learning_rate": 10.0 ** -(5 - number / 2),
            "adapter.method": ['"lora"', '"mixlora"'][number % 2],
        }
        state = TrialState.PRUNED if number % 2 else TrialState.COMPLETE
        study.add_trial(
            create_trial(
                state=state,
                value=curve[max(curve)],
                params=params,
                distributions=DISTRIBUTIONS,
                intermediate_values=curve,
            )
        )
    return study


def test_every_job_is_a_curve_and_stopped_ones_end_in_a_cross(tmp_path):
    curves = [{4: 5.0 - number, 8: 4.0 - number} for number in range(6)]
    drawn = plot_sweep(study_of(curves), NAMES, "eval/loss", tmp_path / "sweep.png").axes
    lines = drawn[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [list(one.values()) for one in curves]
    assert [line.get_marker() for line in lines] == ["o", "x"] * 3
    texts = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert texts == ["lr-004", "lr-002", "lr-000"]  # the best first


def test_the_parameter_that_matters_is_ahead_at_the_last_step_that_all_reached(tmp_path):
    curves = [{4: 5.0 - number} | ({8: 0.0} if number else {}) for number in range(6)]
    drawn = plot_sweep(study_of(curves), NAMES, "eval/loss", tmp_path / "sweep.png").axes
    assert drawn[1].get_xlabel() == "importance for eval/loss after step 4"
    bars = {
        label.get_text(): bar.get_width()
        for label, bar in zip(drawn[1].get_yticklabels(), drawn[1].patches, strict=True)
    }
    assert bars["train.learning_rate"] > 0.8
    assert sum(bars.values()) == pytest.approx(1)


@pytest.mark.parametrize("curves", [[{4: 1.0}], [{4: 1.0}, {8: 2.0}], [{4: 1.0}, {4: 1.0}]])
def test_few_jobs_become_a_picture_too(tmp_path, curves):
    path = tmp_path / "sweep.png"
    plot_sweep(study_of(curves), NAMES, "eval/loss", path)
    assert path.read_bytes().startswith(b"\x89PNG")
