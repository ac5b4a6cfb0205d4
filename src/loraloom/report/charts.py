"""Learning curves of the page: images in SVG that matplotlib draws.

Their colors stand out on white and on black, as the page has a dark mode.
"""

import io
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.figure import Figure

from loraloom.report.jobs import Job

Curve = Sequence[tuple[int | float, int | float]]  # steps and what was measured there

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#997a00", "#7f7f7f")
MAX_POINTS = 240
SMOOTHING = 0.9  # weight of the past in the running mean

_SMOOTHED = ("loss", "grad_norm")
_OFTEN_ZERO = ("aux_loss", "skipped_steps")  # where there are no routers, or nothing overflows
_PASSED_OVER = ("step", "epoch", "tokens", "computed_tokens", "seconds")
_STYLES: list[Any] = ["default", Path(__file__).with_suffix(".mplstyle")]


class Style(NamedTuple):
    """How a job's lines look in every chart."""

    color: str
    dashes: tuple[int, ...]


class Chart(NamedTuple):
    """An image under its title, and in words what it shows."""

    title: str
    words: str
    source: str


def line_chart(title: str, curves: Mapping[str, Curve], styles: dict[str, Style]) -> Chart | None:
    """Draw curves over steps; None where no value is finite."""
    drawn: dict[str, Curve] = {}
    words = [title]
    for label, curve in curves.items():
        finite = [point for point in curve if all(map(math.isfinite, point))]
        if finite:
            drawn[label] = finite
            step, value = finite[-1]
            words.append(f"{label}: {value:.4g} at step {step:g}")
    if not drawn:
        return None
    image = io.BytesIO()
    with style.context(_STYLES):
        figure = Figure(figsize=(5, 3))
        axes = figure.subplots()
        for label, curve in drawn.items():
            stride = math.ceil(len(curve) / MAX_POINTS)
            points = curve[::-stride]  # from the last one
            steps, values = zip(*points, strict=True)
            (line,) = axes.plot(steps, values, color=styles[label].color)
            if styles[label].dashes:
                line.set_linestyle((0, styles[label].dashes))
            if len(points) == 1:
                line.set_marker("o")
        axes.set_xlabel("step")
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{b64encode(image.getvalue()).decode()}"
    return Chart(title, ". ".join(words), source)


def job_styles(jobs: Sequence[Job]) -> dict[str, Style]:
    """Give each job a color by its name, so that seeds look alike, and dashes by its run."""
    names = list(dict.fromkeys(job.name for job in jobs))
    runs = list(dict.fromkeys(job.run for job in jobs))
    styles = {}
    for job in jobs:
        repeat, color = divmod(names.index(job.name), len(COLORS))
        number = runs.index(job.run) + len(runs) * repeat
        # lengths of lines and gaps: solid, then a dash with ever more dots behind it
        dashes = (7, 3) + (1, 2) * (number - 1) if number else ()
        styles[job.label] = Style(COLORS[color], dashes)
    return styles


def learning_curves(jobs: Sequence[Job]) -> list[Chart]:
    curves: dict[str, dict[str, list[Any]]] = {}
    for job in jobs:
        for line in job.metrics:
            step = line["step"]
            for name, value in line.items():
                if isinstance(value, int | float) and name not in _PASSED_OVER:
                    by_job = curves.setdefault(name, {})
                    curve = by_job.setdefault(job.label, [])
                    curve.append((step, value))
    styles = job_styles(jobs)
    charts = [_metric_chart(name, by_job, styles) for name, by_job in curves.items()]
    return [chart for chart in charts if chart is not None]


def _metric_chart(name: str, curves: Mapping[str, Curve], styles: dict[str, Style]) -> Chart | None:
    if name in _SMOOTHED:
        means = {label: _running_mean(curve) for label, curve in curves.items()}
        return line_chart(f"{name}, running mean", means, styles)
    drawn = {}
    for label, curve in curves.items():
        has_values = any(value for _, value in curve)
        if has_values or name not in _OFTEN_ZERO:
            drawn[label] = curve
    return line_chart(name, drawn, styles)


def _running_mean(curve: Curve) -> Curve:
    """Take the mean of finite values without the pull of its start."""
    total = weight = 0.0
    means = []
    for step, value in curve:
        if math.isfinite(value):
            total = SMOOTHING * total + value
            weight = SMOOTHING * weight + 1
            means.append((step, total / weight))
    return means
