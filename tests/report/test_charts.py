from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import matplotlib.style
import pytest

from loraloom.report.charts import MAX_POINTS, Style, interval_chart, line_chart, thinned

STYLE = Style(0, "none")
STYLES = {"a": STYLE, "b": Style(3, "6 3")}


def points(line):
    return list(zip(*line.get_data(), strict=True))


def elements(chart, tag):
    return [one for one in ElementTree.fromstring(chart.svg).iter() if one.tag == tag]


def texts(chart):
    return ["".join(one.itertext()) for one in elements(chart, "text")]


def places(chart):
    """Coordinates of everything that is drawn in color."""
    paths = [one.get("d") for one in elements(chart, "path") if "--c" in one.get("style", "")]
    return [tuple(map(float, place.split())) for path in paths for place in path[1:].split("L")]


def test_a_chart_draws_its_curves_as_they_are_in_the_colors_of_the_page():
    curves = {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 3.0), (2, 2.5), (3, 2.0)]}
    chart = line_chart("loss <1>", curves, STYLES)
    (axes,) = chart.figure.axes
    assert [points(line) for line in axes.lines] == list(curves.values())
    drawn = [one.get("style") for one in elements(chart, "path") if "--c" in one.get("style", "")]
    assert ["stroke: var(--c0)" in style for style in drawn] == [True, False]
    assert ["stroke: var(--c3)" in style for style in drawn] == [False, True]
    assert ["stroke-dasharray: 6,3" in style for style in drawn] == [False, True]
    assert "step" in texts(chart)
    said = ["a: 1 at step 2", "b: 2 at step 3"]
    assert [one.text for one in elements(chart, "title")] == said
    (root,) = elements(chart, "svg")
    assert root.get("aria-label") == "loss <1>. " + ". ".join(said)
    assert root.get("role") == "img"


def test_a_chart_stays_within_its_box():
    chart = line_chart("sine", {"a": [(step, math.sin(step)) for step in range(50)]}, STYLES)
    assert len(places(chart)) == 50
    _, _, width, height = map(float, elements(chart, "svg")[0].get("viewBox").split())
    assert all(46 <= x <= width - 8 and 8 <= y <= height - 30 for x, y in places(chart))


@pytest.mark.parametrize(
    ("curve", "labels"),
    [
        ([(0, 0.0), (45, 1.0)], ["0", "10", "20", "30", "40"]),
        ([(0, 0.0), (4e-5, 1.0)], ["0", "1e−05", "2e−05", "3e−05", "4e−05"]),
        ([(0.9978, 0.0), (0.9987, 1.0)], ["0.9978", "0.998", "0.9982", "0.9984", "0.9986"]),
    ],
)
def test_ticks_are_round_values_with_digits_enough(curve, labels):
    assert texts(line_chart("t", {"a": curve}, STYLES))[: len(labels)] == labels


def test_what_is_not_finite_is_left_out_and_a_single_point_is_a_dot():
    curves = {"a": [(1, math.nan), (2, 1.0), (3, math.inf)], "b": [(1, math.nan)]}
    chart = line_chart("loss", curves, STYLES)
    (line,) = chart.figure.axes[0].lines
    assert line.get_label() == "a: 1 at step 2"
    assert (line.get_linewidth(), line.get_solid_capstyle()) == (8, "round")
    first, second = places(chart)
    assert first == second
    assert line_chart("loss", {"a": [(1, math.nan)]}, STYLES) is None


def test_long_curves_are_thinned_to_means():
    curve = [(step, float(step % 2)) for step in range(10 * MAX_POINTS)]
    few = thinned(curve)
    assert len(few) == MAX_POINTS
    assert few[-1] == (curve[-1][0], 0.5)
    assert points(line_chart("t", {"a": curve}, STYLES).figure.axes[0].lines[0]) == few


def test_intervals_share_an_axis_in_percent():
    rows = [("a", 0.5, (0.4, 0.6), "50 %"), ("b", 0.55, (0.1, 0.9), "55 %")]
    chart = interval_chart("t", rows)
    (axes,) = chart.figure.axes
    assert [points(line) for line in axes.lines] == [
        [(40, 0), (60, 0)],
        [(50, 0)] * 2,
        [(pytest.approx(10), 1), (pytest.approx(90), 1)],
        [(pytest.approx(55), 1)] * 2,
    ]
    assert chart.title == "t: accuracy and 95 % interval, %"
    assert texts(chart)[-2:] == ["a", "b"]
    assert axes.get_ylim() == (1.5, -0.5)  # the first on top
    rows = [("x" * 40 + "@2", 0.5, (0.4, 0.6), "50 %"), ("数学 $a$ <b>", 0.5, (0.4, 0.6), "50 %")]
    names = ["x" * 12 + "…" + "x" * 11 + "@2", "数学 $a$ <b>"]
    assert texts(interval_chart("t", rows))[-2:] == names


def test_a_drawing_refers_to_nothing_and_is_the_same_in_any_style():
    def drawn():
        charts = (
            line_chart("t", {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 1.0)]}, STYLES),
            interval_chart("t", [("a", 0.5, (0.4, 0.6), "words")]),
        )
        return [chart.svg for chart in charts]

    expected = drawn()
    with matplotlib.style.context("ggplot"):  # Optuna's pictures leave one behind, for instance
        assert drawn() == expected
    assert not re.search(r"\bid=|href|url\(|<style|font-family|#c0de", "".join(expected))
