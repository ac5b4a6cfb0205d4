"""The picture of a sweep: every job's course, and how the metric depends on each parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loraloom.config.sweep import format_value
from loraloom.eval.plots import Curve, save_figure

MAX_PANELS = 4
MAX_NAMES = 5
"""Jobs that the legend names, the best that were not stopped."""
_LOG_SPREAD = 20
"""A parameter whose values are further apart than this factor gets a logarithmic axis."""


def plot_sweep(
    curves: Mapping[str, Curve],
    parameters: Mapping[str, Mapping[str, Any]],
    stopped: Collection[str],
    metric: str,
    path: Path,
) -> Figure:
    """Draw the metric by step for every job, and its last value by each parameter.

    Jobs that were stopped are grey and end in a cross.

    Args:
        curves: (step, value) of each job that was measured, the best first.
        parameters: Those that the sweep varies, of each job. More than four are left out.
        stopped: Jobs that were stopped.
        metric: What was measured.
        path: Picture to write.

    Returns:
        What was drawn.
    """
    names = list(next(iter(parameters.values())))[:MAX_PANELS]
    figure = Figure(figsize=(4.5 + 2.5 * len(names), 3.6), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(names), sharey=True)
    styles = _styles(curves, stopped)
    kept = [name for name in curves if name not in stopped]
    _draw_curves(left, curves, styles, named=kept[:MAX_NAMES])
    left.set(xlabel="step", ylabel=metric)
    for axes, name in zip(others, names, strict=True):
        places = _places(axes, [values[name] for values in parameters.values()])
        for job, place in zip(parameters, places, strict=True):
            if job in curves:
                axes.plot([place], [curves[job][-1][1]], linestyle="", **styles[job])
        axes.set_xlabel(name)
    return save_figure(figure, path)


def _styles(curves: Mapping[str, Curve], stopped: Collection[str]) -> dict[str, dict[str, Any]]:
    """How each job is drawn: from dark for the best to light for the worst."""
    kept = [name for name in curves if name not in stopped]
    shades = colormaps["viridis"]
    styles = {
        name: {"color": shades(0.9 * place / max(1, len(kept) - 1)), "marker": "o"}
        for place, name in enumerate(kept)
    }
    return styles | {name: {"color": "0.6", "marker": "x"} for name in curves if name in stopped}


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    styles: Mapping[str, dict[str, Any]],
    named: Collection[str],
) -> None:
    for name in reversed(list(curves)):  # the best above the others
        steps, values = zip(*curves[name], strict=True)
        axes.plot(steps, values, markevery=[-1], linewidth=1.2, label=name, **styles[name])
    handles = {line.get_label(): line for line in axes.get_lines()}
    if named:
        axes.legend([handles[name] for name in named], named, fontsize="small")


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
