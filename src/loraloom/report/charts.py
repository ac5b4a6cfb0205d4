"""Charts of the page, learning curves and intervals: matplotlib draws them as SVG.

The page's style sheet colors them. They are made for a phone's width and may be shown larger.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from loraloom.eval.plots import Curve, Point, smoothed
from loraloom.report.jobs import Job

# Of the palette; then the lines' dashes change.
NUM_COLORS = 6

DASHES = ("none", "6 3", "2 2", "8 3 2 3", "12 4")
MAX_POINTS = 240
# Characters of an adapter's name beside its interval; a longer one loses its middle.
MAX_NAME = 26

# Weight of the past in the running mean of what jumps from step to step.
SMOOTHING = 0.9

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

_WIDTH, _HEIGHT, _ROW = 360, 220, 22
_LEFT, _RIGHT, _TOP, _BOTTOM, _LETTER = 46, 8, 8, 30, 6.2
_RULE = "#c0deff"
# Whatever style is in use: the page brings its own.
_STYLE: tuple[Any, ...] = ("default", {"svg.fonttype": "none", "path.simplify": False})


class Style(NamedTuple):
    """How a job's lines look in every chart: a color of the palette, and dashes."""

    color: int
    dash: str


@dataclass(frozen=True)
class Chart:
    """A drawing under its title; the label of each line says in words what it shows."""

    title: str
    figure: Figure

    @property
    def svg(self) -> Markup:
        text = io.StringIO()
        with style.context(_STYLE), warnings.catch_warnings():
            # the page has fonts of its own
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        svg = text.getvalue()
        lines = [line for axes in self.figure.axes for line in axes.lines]
        words = list(dict.fromkeys(str(line.get_label()) for line in lines))
        (box,) = re.findall(r'viewBox="[^"]*"', svg)
        # what comes before is a document's head and matplotlib's own style
        body = _styled(svg[svg.index("</defs>") + len("</defs>") :])
        for place, line in enumerate(lines, start=1):
            title = f"<g><title>{escape(str(line.get_label()))}</title>"
            body = body.replace(f'<g id="curve{place}">', title)
        label = escape(f"{self.title}. {'. '.join(words)}")
        return Markup(f'<svg class="chart" role="img" aria-label="{label}" {box}>{body}')


def _styled(svg: str) -> str:
    """Leave fonts and colors to the style sheet, and out what would stand twice in the page."""
    svg = re.sub(r' id="(?!curve)[^"]*"', "", svg)
    svg = re.sub(r"font-(size|family): [^;]*; ", "", svg)
    svg = re.sub(r"#c0de0(\d)", r"var(--c\1)", svg).replace(_RULE, "var(--rule)")
    return re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+|\s*\n", r"\1", path[0]), svg)


def line_chart(
    title: str, curves: Mapping[str, Curve], styles: Mapping[str, Style]
) -> Chart | None:
    """Draw curves over steps; None where no value is finite."""
    finite = {label: [p for p in of if all(map(math.isfinite, p))] for label, of in curves.items()}
    drawn = {label: thinned(curve) for label, curve in finite.items() if curve}
    if not drawn:
        return None
    figure, axes = _axes(_HEIGHT, _LEFT)
    axes.margins(x=0, y=0.05)
    axes.grid(axis="y", color=_RULE, linewidth=1, clip_on=False)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("step", loc="right", labelpad=2)
    for label, curve in drawn.items():
        step, value = curve[-1]
        words, dash = f"{label}: {value:.4g} at step {step:g}", styles[label].dash
        _draw(axes, curve, styles[label].color, words, dash)
    return Chart(title, figure)


def interval_chart(title: str, rows: Sequence[tuple[str, int | float, Point, str]]) -> Chart:
    """Draw a value with its interval for each adapter, in percent on one axis."""
    half = MAX_NAME // 2
    names = [n if len(n) <= MAX_NAME else f"{n[: half - 1]}…{n[-half:]}" for n, *_ in rows]
    figure, axes = _axes(_ROW * len(rows) + _TOP + _BOTTOM, _LETTER * max(map(len, names)) + _RIGHT)
    axes.margins(x=0.06)
    axes.grid(axis="x", color=_RULE, linewidth=1, clip_on=False)
    for place, (name, value, (low, high), text) in enumerate(rows):
        _draw(axes, [(100 * low, place), (100 * high, place)], 0, f"{name}: {text}")
        _draw(axes, [(100 * value, place)], 0, f"{name}: {text}")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), names, parse_math=False)
    return Chart(f"{title}: accuracy and 95 % interval, %", figure)


def _axes(height: int, left: int | float) -> tuple[Figure, Axes]:
    """Make axes of a chart's width, with room for the labels of its ticks."""
    figure = Figure(figsize=(_WIDTH / 72, height / 72), frameon=False)
    share_x, share_y = left / _WIDTH, _BOTTOM / height
    box = (share_x, share_y, 1 - share_x - _RIGHT / _WIDTH, 1 - share_y - _TOP / height)
    with style.context(_STYLE):
        axes = figure.add_axes(box, frameon=False)
    axes.tick_params(length=0, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter("{x:g}")
    return figure, axes


def _draw(axes: Axes, points: Curve, color: int, words: str, dash: str = "none") -> None:
    """Draw a line; a single point becomes a dot."""
    look: dict[str, Any] = {"linewidth": 2, "solid_capstyle": "butt"}
    if len(points) == 1:
        points, look = [*points, *points], {"linewidth": 8, "solid_capstyle": "round"}
    elif dash != "none":
        look["linestyle"] = (0, [float(n) / 2 for n in dash.split()])
    place = f"curve{len(axes.lines) + 1}"
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=f"#c0de0{color}", clip_on=False, gid=place, label=words, **look)


def thinned(points: Curve) -> list[Point]:
    """Replace neighbours by their mean until there are few enough points."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


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
    items = (item for job in jobs for line in job.metrics for item in line.items())
    found = dict.fromkeys(name for name, value in items if isinstance(value, int | float))
    accuracies = [name for name in found if name.startswith("eval/") and name not in _TITLES]
    order = dict.fromkeys(["loss", "eval/loss", *accuracies, *_TITLES, *found])
    charts = [_chart(name, jobs) for name in order if name in found and name not in _PASSED_OVER]
    return [chart for chart in charts if chart is not None]


def _chart(name: str, jobs: Sequence[Job]) -> Chart | None:
    curves = {
        job.label: [(line["step"], line[name]) for line in job.metrics if _is_number(line, name)]
        for job in jobs
    }
    if name == "aux_loss":  # always 0 without a router
        curves = {label: curve for label, curve in curves.items() if any(v for _, v in curve)}
    title = _TITLES.get(name, name)
    if name.startswith("eval/") and name.endswith("/accuracy"):
        title = f"Accuracy in {name.removeprefix('eval/').removesuffix('/accuracy')}"
    if name in _SMOOTHED:
        curves = {label: smoothed(curve, SMOOTHING) for label, curve in curves.items()}
        title += ", running mean"
    return line_chart(title, curves, job_styles(jobs))


def _is_number(line: Mapping[str, object], name: str) -> bool:
    return isinstance(line.get(name), int | float)
