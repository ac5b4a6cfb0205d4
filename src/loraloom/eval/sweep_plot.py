"""The picture of a sweep: every job's course, and how much each parameter matters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.importance import get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from loraloom.eval.plots import save_figure

MAX_NAMES = 5
"""Jobs that the legend names, the best that were trained to their end."""


def plot_sweep(study: optuna.Study, names: Sequence[str], metric: str, path: Path) -> Figure | None:
    """Draw the metric by step for every job, and the importance of the parameters for it.

    Jobs that were stopped are grey and end in a cross. Nothing is drawn before an evaluation.
    """
    measured = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    if not measured:
        return None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, measured, names, study.direction == StudyDirection.MAXIMIZE)
    left.set(xlabel="step", ylabel=metric)
    step = _last_common_step(measured)
    if step is not None and len({trial.intermediate_values[step] for trial in measured}) > 1:
        importances = _importances(study, measured, step)
        right.barh(list(importances), list(importances.values()))
        right.set(xlabel=f"importance for {metric} after step {step}", xlim=(0, 1))
        right.invert_yaxis()
    return save_figure(figure, path)


def _draw_curves(
    axes: Axes, trials: Sequence[FrozenTrial], names: Sequence[str], higher_is_better: bool
) -> None:
    lines = {}
    for trial in trials:
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        is_stopped = trial.state == TrialState.PRUNED
        style: dict[str, Any] = {"color": "0.6", "marker": "x"} if is_stopped else {"marker": "o"}
        (lines[trial.number],) = axes.plot(steps, values, markevery=[-1], **style)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    finished.sort(key=lambda trial: trial.value or 0.0, reverse=higher_is_better)
    named = [trial.number for trial in finished[:MAX_NAMES]]
    if named:
        axes.legend([lines[one] for one in named], [names[one] for one in named], fontsize="small")


def _last_common_step(trials: Sequence[FrozenTrial]) -> int | None:
    """The last step at which all were measured: there they compare."""
    steps = [set(trial.intermediate_values) for trial in trials]
    return max(set.intersection(*steps), default=None)


def _importances(study: optuna.Study, trials: Sequence[FrozenTrial], step: int) -> dict[str, float]:
    """How much the metric at a step depends on each parameter; they sum to one."""
    compared = optuna.create_study(direction=study.direction)
    for trial in trials:
        value = trial.intermediate_values[step]
        compared.add_trial(
            create_trial(params=trial.params, distributions=trial.distributions, value=value)
        )
    return get_param_importances(compared)
