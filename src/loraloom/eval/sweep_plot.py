"""The picture of a sweep: every job's course, and how the metric depends on each parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from loraloom.config.sweep import format_value
from loraloom.eval.plots import Curve, save_figure

MAX_PANELS = 4
_LOG_SPREAD = 20
"""A parameter whose values are further apart than this factor gets a logarithmic axis."""


def plot_sweep(
    curves: Mapping[str, Curve],
    parameters: Mapping[str, Mapping[str, Any]],
    stopped: Collection[str],
    metric: str,
    path: Path,
) -> None:
    """Draw the metric by step for every job, and its last value by each parameter.

    Jobs that were stopped are grey and end in a cross.

    Args:
        curves: (step, value) of each job that was measured.
        parameters: Those that the sweep varies, of each job. More than four are left out.
        stopped: Jobs that were stopped.
        metric: What was measured.
        path: Picture to write.
    """
    names = list(next(iter(parameters.values())))[:MAX_PANELS]
    figure, panels = plt.subplots(
        1, 1 + len(names), figsize=(4.5 + 3 * len(names), 4), sharey=True, layout="constrained"
    )
    left, *others = panels
    _draw_curves(left, curves, stopped)
    left.set(xlabel="step", ylabel=metric)
    for axes, name in zip(others, names, strict=True):
        values = {job: parameters[job][name] for job in curves}
        _draw_parameter(axes, values, {job: curve[-1][1] for job, curve in curves.items()}, stopped)
        axes.set_xlabel(name)
    save_figure(figure, path)


def _draw_curves(axes: Axes, curves: Mapping[str, Curve], stopped: Collection[str]) -> None:
    for index, (name, curve) in enumerate(curves.items()):
        steps, values = zip(*sorted(curve), strict=True)
        if name in stopped:
            axes.plot(steps, values, color="0.7", linewidth=1, marker=".", markersize=3)
            axes.plot(steps[-1:], values[-1:], color="0.5", marker="x", linestyle="")
        else:
            axes.plot(steps, values, color=f"C{index}", marker=".", label=name)
    if len(stopped) < len(curves):
        axes.legend(fontsize="small")


def _draw_parameter(
    axes: Axes,
    values: Mapping[str, Any],
    metrics: Mapping[str, float],
    stopped: Collection[str],
) -> None:
    places = _places(axes, list(values.values()))
    for index, (name, place) in enumerate(zip(values, places, strict=True)):
        is_stopped = name in stopped
        axes.plot(
            [place],
            [metrics[name]],
            color="0.5" if is_stopped else f"C{index}",
            marker="x" if is_stopped else "o",
            linestyle="",
        )


def _places(axes: Axes, values: Sequence[Any]) -> list[int | float]:
    """Where values lie on the axis, which is set up: numbers by size, others one after another."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and max(values) / min(values) > _LOG_SPREAD:
            axes.set_xscale("log")
        return list(values)
    labels = list(dict.fromkeys(map(format_value, values)))
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    return [labels.index(format_value(value)) for value in values]
