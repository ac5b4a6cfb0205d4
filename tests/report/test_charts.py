from __future__ import annotations

import math

import pytest

from loraloom.report.charts import (
    MAX_POINTS,
    Axis,
    Series,
    Style,
    interval_chart,
    line_chart,
    round_values,
    smoothed,
    thinned,
)

STYLE = Style(0, "none")


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (2.13, 2.49, [2.2, 2.3, 2.4]),
        (-3, 47, [0, 10, 20, 30, 40]),
        (1e-6, 9e-6, [2e-6, 4e-6, 6e-6, 8e-6]),
    ],
)
def test_ticks_are_at_round_values_within_the_axis(low, high, values):
    assert round_values(Axis(low, high, 0, 1), 5) == pytest.approx(values)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 45, ["0", "10", "20", "30", "40"]),
        (0.9978, 0.9987, ["0.9978", "0.9980", "0.9982", "0.9984", "0.9986"]),
        (0, 5e-4, ["0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4"]),
    ],
)
def test_ticks_have_digits_enough(low, high, labels):
    assert [tick.label for tick in Axis(low, high, 0, 1).ticks(5)] == labels


def test_an_axis_maps_its_ends_to_places():
    axis = Axis(2, 4, 100, 0)
    assert [axis.place(value) for value in (2, 3, 4)] == [100, 50, 0]


def test_a_curve_stays_within_its_chart():
    points = [(float(step), math.sin(step)) for step in range(50)]
    chart = line_chart("sine", [Series("a", STYLE, points)])
    (line,) = chart.lines
    places = [tuple(map(float, place.split())) for place in line.path[1:].split("L")]
    assert len(places) == 50
    assert all(chart.left <= x <= chart.right for x, _ in places)
    assert all(chart.top <= y <= chart.bottom for _, y in places)


def test_what_is_not_finite_is_left_out():
    points = [(1.0, math.nan), (2.0, 1.0), (3.0, math.inf)]
    chart = line_chart("loss", [Series("a", STYLE, points), Series("b", STYLE, [(1.0, math.nan)])])
    assert [line.label for line in chart.lines] == ["a"]
    assert line_chart("loss", [Series("a", STYLE, [(1.0, math.nan)])]) is None


def test_a_single_point_is_a_dot():
    (line,) = line_chart("loss", [Series("a", STYLE, [(5.0, 0.0)])]).lines
    assert line.dot is not None


def test_long_curves_are_thinned_to_means():
    points = [(float(step), float(step % 2)) for step in range(10 * MAX_POINTS)]
    few = thinned(points)
    assert len(few) == MAX_POINTS
    assert few[-1] == (points[-1][0], 0.5)


def test_a_running_mean_starts_at_the_first_value():
    assert smoothed([(1, 4.0), (2, 4.0)], 0.9) == [(1, pytest.approx(4)), (2, pytest.approx(4))]


def test_bars_share_an_axis():
    chart = interval_chart("t", [("a", 0.5, (0.4, 0.6), "50"), ("b", 0.5, (0.1, 0.9), "50")])
    assert chart.bars[0].place == chart.bars[1].place == 50
    assert 0 < chart.bars[1].low < chart.bars[0].low
    assert chart.bars[1].high < 100
