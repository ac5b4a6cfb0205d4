"""Charts as coordinates: what templates draw as SVG.

A chart is made for a phone's width and may be drawn larger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Number = int | float
Point = tuple[Number, Number]

NUM_COLORS = 6
"""Of the palette; then the lines' dashes change."""

DASHES = ("none", "6 3", "2 2", "8 3 2 3", "12 4")
MAX_POINTS = 240

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 30


@dataclass(frozen=True)
class Style:
    """How a job's lines look in every chart: a color of the palette, and dashes."""

    color: int
    dash: str


@dataclass(frozen=True)
class Series:
    """A curve to draw."""

    label: str
    style: Style
    points: Sequence[Point]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and what it says."""

    position: Number
    label: str


@dataclass(frozen=True)
class Line:
    """A curve in the chart's coordinates, and its last value in words."""

    label: str
    style: Style
    path: str
    dot: Point | None
    last: str


@dataclass(frozen=True)
class LineChart:
    """Curves over steps."""

    title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Axis:
    """From values to places."""

    low: Number
    high: Number
    start: Number
    end: Number

    def place(self, value: Number) -> float:
        """Where a value is, rounded to tenths."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int) -> list[Tick]:
        """Marks at round values."""
        values = round_values(self, count)
        return [
            Tick(self.place(value), label)
            for value, label in zip(values, _short(values), strict=True)
        ]


def line_chart(title: str, series: Sequence[Series]) -> LineChart | None:
    """Lay curves out; None where no value is finite."""
    drawn = [Series(one.label, one.style, thinned(finite(one.points))) for one in series]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return None
    points = [point for one in drawn for point in one.points]
    x = _axis([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, margin=0)
    y = _axis([y for _, y in points], _HEIGHT - _BOTTOM, _TOP, margin=0.05)
    return LineChart(title, x.ticks(5), y.ticks(5), [_line(one, x, y) for one in drawn])


def _line(series: Series, x: Axis, y: Axis) -> Line:
    places = [(x.place(step), y.place(value)) for step, value in series.points]
    path = "M" + "L".join(f"{left} {top}" for left, top in places)
    step, value = series.points[-1]
    dot = places[0] if len(places) == 1 else None
    return Line(series.label, series.style, path, dot, f"{value:.4g} at step {step:g}")


def _axis(values: Sequence[Number], start: Number, end: Number, margin: Number) -> Axis:
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) / 10 or 1
        return Axis(low - pad, high + pad, start, end)
    pad = margin * (high - low)
    return Axis(low - pad, high + pad, start, end)


def round_values(axis: Axis, count: int) -> list[Number]:
    """Choose about so many multiples of 1, 2 or 5 times a power of ten within an axis."""
    rough = (axis.high - axis.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(values: Sequence[Number]) -> list[str]:
    """Write ticks with the decimals that they need, very small or large ones as powers."""
    form = "f" if 1e-3 <= max(map(abs, values), default=0) < 1e5 else "e"
    written = ([f"{value:.{digits}{form}}" for value in values] for digits in range(10))
    texts = next(texts for texts in written if _says(texts, values))
    short = {"0e+00": "0"}
    return [short.get(text, text.replace("e-0", "e-").replace("e+0", "e")) for text in texts]


def _says(texts: Sequence[str], values: Sequence[Number]) -> bool:
    return all(
        math.isclose(float(text), value, rel_tol=1e-6, abs_tol=1e-12)
        for text, value in zip(texts, values, strict=True)
    )


def finite(points: Iterable[Point]) -> list[Point]:
    """Leave out what can't be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Replace neighbours by their mean until there are few enough points."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def smoothed(points: Sequence[Point], past: Number) -> list[Point]:
    """Take a running mean without the pull of its start; `past` is the weight of what was."""
    total = weight = 0.0
    means = []
    for step, value in points:
        total = past * total + (1 - past) * value
        weight = past * weight + (1 - past)
        means.append((step, total / weight))
    return means


@dataclass(frozen=True)
class Bar:
    """A value with its interval, as shares of a chart's width in percent."""

    label: str
    low: Number
    high: Number
    place: Number
    text: str


@dataclass(frozen=True)
class IntervalChart:
    """A row for each adapter: its value and interval on one axis."""

    title: str
    ticks: Sequence[Tick]
    bars: Sequence[Bar]


def interval_chart(
    title: str, rows: Sequence[tuple[str, Number, tuple[Number, Number], str]]
) -> IntervalChart:
    """Lay values out.

    Args:
        title: Heading.
        rows: At least one: name, value, interval, and all that in words.
    """
    bounds = [bound for _, value, interval, _ in rows for bound in (value, *interval)]
    axis = _axis(bounds, 0, 100, margin=0.06)
    bars = [
        Bar(name, axis.place(low), axis.place(high), axis.place(value), text)
        for name, value, (low, high), text in rows
    ]
    ticks = [Tick(axis.place(v), f"{100 * v:.3g}") for v in round_values(axis, 4)]
    return IntervalChart(title, ticks, bars)
