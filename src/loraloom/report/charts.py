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
    drawn: dict[str, Curve] = {}
    words = []
    for label, curve in curves.items():
        finite = [point for point in curve if all(map(math.isfinite, point))]
        if finite:
            drawn[label] = finite
            step, value = finite[-1]
            words.append(f"{label}: {value:.4g} at step {step:g}")

    def draw(axes: Axes) -> None:
        for label, curve in drawn.items():
            points = curve[:: -math.ceil(len(curve) / MAX_POINTS)]  # from the last one
            steps, values = zip(*points, strict=True)
            (line,) = axes.plot(steps, values, color=styles[label].color)
            if styles[label].dashes:
                line.set_linestyle((0, styles[label].dashes))
            if len(points) == 1:
                line.set_marker("o")
        axes.set_xlabel("step")

    return _draw(title, words, 3, draw) if drawn else None


def interval_chart(task: str, results: Mapping[str, Mapping[str, Any]]) -> Chart | None:
    """Draw each adapter's accuracy with its interval, in percent; None if none has both."""
    names, words, figures = [], [], []
    for name, result in results.items():
        accuracy = result.get("accuracy")
        # of preference pairs, `interval` is the loss's
        interval = result.get("accuracy_interval", result.get("interval"))
        if accuracy is not None and interval:
            names.append(_shortened(name))
            words.append(f"{name}: {100 * accuracy:.1f} %")
            figures.append((accuracy, *interval))

    def draw(axes: Axes) -> None:
        for row, (accuracy, low, high) in enumerate(figures):
            axes.plot([100 * low, 100 * high], [row, row], color=COLORS[0])
            axes.plot([100 * accuracy], [row], color=COLORS[0], marker="o")
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()

    title = f"{task}: accuracy and 95 % interval, %"
    return _draw(title, words, 0.6 + 0.25 * len(names), draw) if names else None


def _shortened(name: str) -> str:
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"


def job_styles(jobs: Sequence[Job]) -> dict[str, Style]:
    """Give each job a color by its name, so that seeds look alike, and dashes by its run."""
    names = list(dict.fromkeys(job.name for job in jobs))
    runs = list(dict.fromkeys(job.run for job in jobs))
    styles = {}
    for job in jobs:
        repeat, color = divmod(names.index(job.name), len(COLORS))
        dashes = _dashes(runs.index(job.run) + len(runs) * repeat)
        styles[job.label] = Style(COLORS[color], dashes)
    return styles


def _dashes(number: int) -> tuple[int, ...]:
    """Lengths of lines and gaps: solid, then a dash with ever more dots behind it."""
    return (7, 3) + (1, 2) * (number - 1) if number else ()


def learning_curves(jobs: Sequence[Job]) -> list[Chart]:
    """Make a chart for each figure in the jobs' metrics."""
    names: dict[str, None] = {}  # in their order
    for line in (line for job in jobs for line in job.metrics):
        names |= {name: None for name, value in line.items() if isinstance(value, int | float)}
    charts = [_chart(name, jobs) for name in names if name not in _PASSED_OVER]
    return [chart for chart in charts if chart is not None]


def _chart(name: str, jobs: Sequence[Job]) -> Chart | None:
    is_smoothed = name in _SMOOTHED
    # always 0 where there are no routers, or nothing overflows
    hides_zeros = name in ("aux_loss", "skipped_steps")
    curves: dict[str, Curve] = {}
    for job in jobs:
        points = [(line["step"], line.get(name)) for line in job.metrics]
        curve: list[Any] = [point for point in points if isinstance(point[1], int | float)]
        if not hides_zeros or any(value for _, value in curve):
            curves[job.label] = smoothed(curve, SMOOTHING) if is_smoothed else curve
    title = f"{name}, running mean" if is_smoothed else name
    return line_chart(title, curves, job_styles(jobs))


def smoothed(curve: Curve, past: float) -> Curve:
    """Take a running mean without the pull of its start over finite values."""
    total = weight = 0.0
    means = []
    for step, value in curve:
        if math.isfinite(value):
            total = past * total + (1 - past) * value
            weight = past * weight + (1 - past)
            means.append((step, total / weight))
    return means
