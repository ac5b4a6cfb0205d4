"""Learning curves of all jobs, a chart for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraloom.eval.plots import smoothed
from loraloom.report.charts import DASHES, NUM_COLORS, Chart, Style, line_chart
from loraloom.report.files import Job

SMOOTHING = 0.9
"""Weight of the past in the running mean of what jumps from step to step."""

_TITLES = {
    "loss": "Training loss",
    "eval/loss": "Loss on held-out examples",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "aux_loss": "Router losses with their coefficients",
    "router/entropy": "Router entropy (1: uniform)",
    "router/load_cv": "Spread of the experts' load (0: balanced)",
}
_SMOOTHED = ("loss", "grad_norm")
_PASSED_OVER = ("step", "epoch", "tokens", "computed_tokens", "seconds")


def job_styles(jobs: Sequence[Job]) -> dict[str, Style]:
    """Give each job a color by its name, so that seeds look alike, and dashes by its run."""
    names = list(dict.fromkeys(job.name for job in jobs))
    runs = list(dict.fromkeys(job.run for job in jobs))
    styles = {}
    for job in jobs:
        place = names.index(job.name)
        dash = runs.index(job.run) + len(runs) * (place // NUM_COLORS)
        styles[job.label] = Style(place % NUM_COLORS, DASHES[dash % len(DASHES)])
    return styles


def learning_curves(jobs: Sequence[Job]) -> list[Chart]:
    """Make a chart for each figure in the jobs' metrics, the well-known ones first."""
    found = dict.fromkeys(
        name
        for job in jobs
        for line in job.metrics
        for name, value in line.items()
        if isinstance(value, int | float) and name not in _PASSED_OVER
    )
    accuracies = [name for name in found if name.startswith("eval/") and name not in _TITLES]
    others = [name for name in found if name not in _TITLES and name not in accuracies]
    order = ["loss", "eval/loss", *accuracies, *list(_TITLES)[2:], *others]
    charts = [_chart(name, jobs) for name in order if name in found]
    return [chart for chart in charts if chart is not None]


def _chart(name: str, jobs: Sequence[Job]) -> Chart | None:
    curves = {job.label: _curve(job.metrics, name) for job in jobs}
    if name == "aux_loss":  # always 0 without a router
        curves = {label: curve for label, curve in curves.items() if any(v for _, v in curve)}
    title = _TITLES.get(name) or _title(name)
    if name in _SMOOTHED:
        curves = {label: smoothed(curve, SMOOTHING) for label, curve in curves.items()}
        title += ", running mean"
    return line_chart(title, curves, job_styles(jobs))


def _title(name: str) -> str:
    """Name what has no title of its own."""
    start, _, rest = name.partition("/")
    task, _, last = rest.rpartition("/")
    return f"Accuracy in {task}" if (start, last) == ("eval", "accuracy") else name


def _curve(metrics: Sequence[Mapping[str, object]], name: str) -> list[tuple[float, float]]:
    """One figure's course, (step, value)."""
    return [
        (float(line["step"]), float(value))  # pyright: ignore[reportArgumentType]
        for line in metrics
        if isinstance(value := line.get(name), int | float)
    ]
