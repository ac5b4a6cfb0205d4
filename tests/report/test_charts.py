import base64
import re
from xml.etree import ElementTree

import matplotlib.style

from loraloom.report.charts import learning_curves
from loraloom.report.jobs import Job

SVG = "{http://www.w3.org/2000/svg}"
COLORS = ("#0072b2", "#d55e00", "#009e73")


def svg(chart):
    return base64.b64decode(chart.source.removeprefix("data:image/svg+xml;base64,")).decode()


def elements(chart, tag):
    root = ElementTree.fromstring(svg(chart))
    return [one for one in root.iter() if one.tag.rpartition("}")[2] == tag]


def texts(chart):
    return ["".join(one.itertext()) for one in elements(chart, "text")]


def lines(chart):
    """Style and coordinates of everything that is drawn in color, outside of the legend."""
    (axes,) = [group for group in elements(chart, "g") if group.get("id") == "axes_1"]
    paths = [(path.get("style", ""), path.get("d") or "") for path in axes.iter(f"{SVG}path")]
    places = lambda path: [tuple(map(float, p.split())) for p in path[1:].split("L")]  # noqa: E731
    return [
        (style, places(path))
        for style, path in paths
        if any(f"stroke: {c}" in style for c in COLORS) and "z" not in path and "C" not in path
    ]


def job(name, *points, metric="eval/loss", run="run"):
    metrics = [{"step": step, metric: value} for step, value in points]
    return Job(name, run, metrics, None, label=f"{run}/{name}", drawn={})


def test_a_chart_draws_its_curves_and_says_where_they_end():
    jobs = [job("a", (1, 2.0), (2, 1.0)), job("b", (1, 3.0), (2, 2.5), (3, 2.0))]
    (chart,) = learning_curves(jobs)
    (first, of_a), (second, of_b) = lines(chart)
    assert (len(of_a), len(of_b)) == (2, 3)
    assert of_a[0][1] < of_a[1][1], "higher values are further up"
    assert COLORS[0] in first
    assert COLORS[1] in second
    assert "step" in texts(chart)
    assert chart.words == "eval/loss. run/a: 1 at step 2. run/b: 2 at step 3"


def test_seeds_share_a_color_and_differ_in_dashes():
    points = [(1, 2.0), (2, 1.0)]
    jobs = [job(name, *points, run=run) for run in ("one", "two") for name in ("_lora", "$mix$")]
    (chart,) = learning_curves(jobs)
    drawn = [style for style, _ in lines(chart)]
    for color, style in zip([*COLORS[:2]] * 2, drawn, strict=True):
        assert f"stroke: {color}" in style
    assert ["stroke-dasharray" in style for style in drawn] == [False, False, True, True]
    assert texts(chart)[-4:] == ["one/_lora", "one/$mix$", "two/_lora", "two/$mix$"]


def test_what_was_not_measured_is_left_out():
    jobs = [job("a", (1, None), (2, 1.0), (3, None)), job("b", (1, None)), job("c")]
    (chart,) = learning_curves(jobs)
    assert chart.words == "eval/loss. run/a: 1 at step 2"
    assert learning_curves(jobs[1:]) == []
    assert learning_curves([job("a", (1, 0.0), metric="aux_loss")]) == []


def test_running_means_are_not_pulled_to_their_start():
    (chart,) = learning_curves([job("a", (1, 3.0), (2, 1.0), metric="loss")])
    assert chart.words == f"loss, running mean. run/a: {(0.9 * 3 + 1) / 1.9:.4g} at step 2"


def test_a_drawing_is_the_same_in_any_style_and_asks_the_network_for_nothing():
    def drawn():
        (chart,) = learning_curves([job("a", (1, 2.0), (2, 1.0)), job("b", (1, 1.0))])
        return svg(chart)

    expected = drawn()
    with matplotlib.style.context("ggplot"):  # Optuna's pictures leave one behind, for instance
        assert drawn() == expected
    assert not re.search(r'href="[^#]|<script', expected)
