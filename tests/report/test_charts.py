import base64
import math
import re
from xml.etree import ElementTree

import matplotlib.style

from loraloom.report.charts import COLORS, MAX_POINTS, Style, line_chart

STYLES = {"a": Style(COLORS[0], ()), "b": Style(COLORS[3], (6, 3))}


def svg(chart):
    return base64.b64decode(chart.source.removeprefix("data:image/svg+xml;base64,")).decode()


def elements(chart, tag):
    root = ElementTree.fromstring(svg(chart))
    return [one for one in root.iter() if one.tag.rpartition("}")[2] == tag]


def texts(chart):
    return ["".join(one.itertext()) for one in elements(chart, "text")]


def lines(chart):
    """Style and coordinates of everything that is drawn in color."""
    paths = [(one.get("style", ""), one.get("d") or "") for one in elements(chart, "path")]
    places = lambda path: [tuple(map(float, p.split())) for p in path[1:].split("L")]  # noqa: E731
    return [
        (style, places(path))
        for style, path in paths
        if any(f"stroke: {c}" in style for c in COLORS) and "z" not in path and "C" not in path
    ]


def test_a_chart_draws_its_curves_and_says_where_they_end():
    curves = {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 3.0), (2, 2.5), (3, 2.0)]}
    chart = line_chart("loss <1>", curves, STYLES)
    (first, of_a), (second, of_b) = lines(chart)
    assert (len(of_a), len(of_b)) == (2, 3)
    assert of_a[0][1] > of_a[1][1], "higher values are further up, and drawn from the last"
    assert COLORS[0] in first
    assert COLORS[3] in second
    assert ["stroke-dasharray" in style for style in (first, second)] == [False, True]
    assert "step" in texts(chart)
    assert chart.words == "loss <1>. a: 1 at step 2. b: 2 at step 3"


def test_what_is_not_finite_is_left_out():
    curves = {"a": [(1, math.nan), (2, 1.0), (3, math.inf)], "b": [(1, math.nan)]}
    assert line_chart("loss", curves, STYLES).words == "loss. a: 1 at step 2"
    assert line_chart("loss", {"a": [(1, math.nan)]}, STYLES) is None


def test_long_curves_are_thinned():
    curve = [(step, float(step % 7)) for step in range(10 * MAX_POINTS)]
    ((_, points),) = lines(line_chart("t", {"a": curve}, STYLES))
    assert MAX_POINTS / 2 < len(points) <= MAX_POINTS


def test_a_drawing_is_the_same_in_any_style_and_asks_the_network_for_nothing():
    def drawn():
        return svg(line_chart("t", {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 1.0)]}, STYLES))

    expected = drawn()
    with matplotlib.style.context("ggplot"):  # Optuna's pictures leave one behind, for instance
        assert drawn() == expected
    assert not re.search(r'href="[^#]|<script', expected)
