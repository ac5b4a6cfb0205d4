"""Charts of the page, learning curves and intervals: images in SVG that matplotlib draws.

Their colors stand out on white and on black, as the page has a dark mode.
"""

import io
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loraloom.report.jobs import Job

# Steps and what was measured there.
Curve = Sequence[tuple[int | float, int | float]]

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#997a00", "#7f7f7f")
MAX_POINTS = 240
# Characters of an adapter's name beside its interval; a longer one loses its middle.
MAX_NAME = 26
# Weight of the past in the running mean of what jumps from step to step.
SMOOTHING = 0.9

_SMOOTHED = ("loss", "grad_norm")
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


def _draw(title: str, words: Sequence[str], height: int | float, draw: Any) -> Chart:
    """Make axes, let a function draw in them, and give the image as a URL that has it all."""
    image = io.BytesIO()
    with style.context(_STYLES):
        figure = Figure(figsize=(5, height))
        draw(figure.subplots())
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{b64encode(image.getvalue()).decode()}"
    return Chart(title, ". ".join([title, *words]), source)


def line_chart(title: str, curves: dict[str, Curve], styles: dict[str, Style]) -> Chart | None:
    """Draw curves over steps; None where no value is finite."""
    finite = {label: [p for p in of if all(map(math.isfinite, p))] for label, of in curves.items()}
    drawn = {label: curve for label, curve in finite.items() if curve}
    words = [f"{label}: {of[-1][1]:.4g} at step {of[-1][0]:g}" for label, of in drawn.items()]

    def draw(axes: Axes) -> None:
        for label, curve in drawn.items():
            points = curve[:: -math.ceil(len(curve) / MAX_POINTS)]  # from the last one
            look = {"color": styles[label].color, "linestyle": (0, styles[label].dashes or None)}
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) == 1 else None, **look)
        axes.set_xlabel("step")

    return _draw(title, words, 3, draw) if drawn else None


def interval_chart(task: str, results: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """Draw each adapter's accuracy with its interval, in percent; None if none has both."""
    # Of preference pairs, `interval` is the loss's.
    intervals = {n: one.get("accuracy_interval", one.get("interval")) for n, one in results.items()}
    found = {n: x for n, x in results.items() if intervals[n] and x.get("accuracy") is not None}
    ends = [(one["accuracy"], *intervals[n]) for n, one in found.items()]
    words = [f"{n}: {100 * one['accuracy']:.1f} %" for n, one in found.items()]
    half = MAX_NAME // 2
    names = [n if len(n) <= MAX_NAME else f"{n[: half - 1]}…{n[-half:]}" for n in found]

    def draw(axes: Axes) -> None:
        for place, (value, low, high) in enumerate(ends):
            axes.plot([100 * low, 100 * high], [place, place], color=COLORS[0])
            axes.plot([100 * value], [place], color=COLORS[0], marker="o")
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()

    title = f"{task}: accuracy and 95 % interval, %"
    return _draw(title, words, 0.6 + 0.25 * len(found), draw) if found else None


def job_styles(jobs: Sequence[Job]) -> dict[str, Style]:
    """Give each job a color by its name, so that seeds look alike, and dashes by its run."""
    names = list(dict.fromkeys(job.name for job in jobs))
    runs = list(dict.fromkeys(job.run for job in jobs))
    styles = {}
    for job in jobs:
        repeat, color = divmod(names.index(job.name), len(COLORS))
        styles[job.label] = Style(COLORS[color], _dashes(runs.index(job.run) + len(runs) * repeat))
    return styles


def _dashes(number: int) -> tuple[int, ...]:
    """Lengths of lines and gaps: solid, then a dash with ever more dots behind it."""
    return (7, 3) + (1, 2) * (number - 1) if number else ()


def learning_curves(jobs: Sequence[Job]) -> list[Chart]:
    """Make a chart for each figure in the jobs' metrics."""
    items = (item for job in jobs for line in job.metrics for item in line.items())
    found = dict.fromkeys(name for name, value in items if isinstance(value, int | float))
    return list(filter(None, (_chart(name, jobs) for name in found if name not in _PASSED_OVER)))


def _chart(name: str, jobs: Sequence[Job]) -> Chart | None:
    curves: dict[str, Curve] = {}
    for job in jobs:
        found: list[Any] = [(line["step"], line.get(name)) for line in job.metrics]
        curve = [point for point in found if isinstance(point[1], int | float)]
        # always 0 where there are no routers, or nothing overflows
        if name not in ("aux_loss", "skipped_steps") or any(value for _, value in curve):
            curves[job.label] = smoothed(curve, SMOOTHING) if name in _SMOOTHED else curve
    title = f"{name}, running mean" if name in _SMOOTHED else name
    return line_chart(title, curves, job_styles(jobs))


def smoothed(curve: Curve, past: float) -> Curve:
    """Take a running mean without the pull of its start over finite values."""
    total, weight, means = 0.0, 0.0, []
    for step, value in curve:
        if math.isfinite(value):
            total, weight = past * total + (1 - past) * value, past * weight + (1 - past)
            means.append((step, total / weight))
    return means
