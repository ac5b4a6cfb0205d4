"""Learning curves of the page: images in SVG that matplotlib draws.

Their colors stand out on white and on black, as the page has a dark mode.
"""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from loraloom.report.jobs import Job

SMOOTHING = 0.9  # weight of the past in the running mean

_SMOOTHED = ("loss", "grad_norm")
_OFTEN_ZERO = ("aux_loss", "skipped_steps")  # where there are no routers, or nothing overflows
_PASSED_OVER = ["epoch", "tokens", "computed_tokens", "seconds", "warnings"]
_DASHES = ("-", "--", "-.", ":")
_STYLES: list[Any] = ["default", Path(__file__).with_suffix(".mplstyle")]


class Chart(NamedTuple):
    """An image under its title, and in words what it shows."""

    title: str
    words: str
    source: str


def learning_curves(jobs: Sequence[Job]) -> list[Chart]:
    lines = [{"job": job.label, **line} for job in jobs for line in job.metrics]
    if not lines:
        return []
    metrics = DataFrame(lines).drop(columns=_PASSED_OVER, errors="ignore")
    metrics = metrics.set_index(["job", "step"]).astype(float)
    formats = _formats(jobs)
    charts = []
    for name in metrics.columns:
        title = f"{name}, running mean" if name in _SMOOTHED else name
        curves: dict[str, Any] = {}
        for label, values in metrics[name].dropna().groupby(level="job", sort=False):
            curve: Any = values.droplevel("job")
            if name in _SMOOTHED:
                curve = curve.ewm(alpha=1 - SMOOTHING).mean()
            if name not in _OFTEN_ZERO or curve.any():
                curves[str(label)] = curve
        if curves:
            charts.append(_draw(title, curves, formats))
    return charts


def _formats(jobs: Sequence[Job]) -> dict[str, str]:
    """Give each job a color by its name, so that seeds look alike, and dashes by its run."""
    names = list(dict.fromkeys(job.name for job in jobs))
    runs = list(dict.fromkeys(job.run for job in jobs))
    formats = {}
    for job in jobs:
        dashes = _DASHES[runs.index(job.run) % len(_DASHES)]
        formats[job.label] = f"C{names.index(job.name)}{dashes}"
    return formats


def _draw(title: str, curves: Mapping[str, Series], formats: Mapping[str, str]) -> Chart:
    words = [title]
    image = io.BytesIO()
    with style.context(_STYLES):
        figure = Figure(figsize=(5, 3 + 0.1 * len(curves)))
        axes = figure.subplots()
        for label, curve in curves.items():
            words.append(f"{label}: {curve.iloc[-1]:.4g} at step {curve.index[-1]}")
            marker = "o" if len(curve) == 1 else ""
            axes.plot(curve, formats[label], marker=marker)
        axes.set_xlabel("step")
        figure.legend(axes.get_lines(), list(curves), loc="outside lower left", ncols=2)
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{b64encode(image.getvalue()).decode()}"
    return Chart(title, ". ".join(words), source)
