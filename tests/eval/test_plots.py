from __future__ import annotations

import math

import pytest

from loraloom.eval.plots import plot_expert_load, plot_loss_curves, smoothed

PNG = b"\x89PNG"


def points(line):
    return list(zip(*line.get_data(), strict=True))


def test_a_loss_curve_is_drawn_raw_and_smoothed(tmp_path):
    path = tmp_path / "new" / "loss.png"
    curves = {"a": [(1, 2.0), (2, 1.0), (3, 0.5)], "b": [(1, 3.0)]}
    (axes,) = plot_loss_curves(curves, path, smoothing=0.5).axes
    assert path.read_bytes().startswith(PNG)
    raw_a, smooth_a, raw_b, smooth_b = axes.lines
    assert points(raw_a) == curves["a"]
    assert points(smooth_a) == [(1, 2.0), (2, pytest.approx(4 / 3)), (3, pytest.approx(6 / 7))]
    assert points(raw_b) == points(smooth_b) == curves["b"]
    assert raw_a.get_color() == smooth_a.get_color() != raw_b.get_color()
    assert raw_a.get_alpha() < 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss per token (nats)")
    assert axes.get_ylim()[0] == 0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_a_loss_that_is_not_finite_leaves_the_smoothed_curve_whole(tmp_path):
    curves = {"a": [(1, 2.0), (2, math.nan), (3, 2.0)]}
    (axes,) = plot_loss_curves(curves, tmp_path / "loss.png").axes
    assert points(axes.lines[1]) == [(1, 2.0), (3, pytest.approx(2.0))]


def test_a_running_mean_starts_at_the_first_value():
    assert smoothed([(1, 4.0), (2, 4.0)], 0.9) == [(1, pytest.approx(4)), (2, pytest.approx(4))]
    assert smoothed([(1, math.inf)], 0.9) == []


def test_expert_load_is_drawn_by_layer_and_by_group_on_one_scale(tmp_path):
    path = tmp_path / "load.png"
    by_layer, by_group = [[0.5, 0.5], [0.9, 0.1]], {"sums": [0.25, 0.75], "dates": [0.6, 0.4]}
    figure = plot_expert_load(by_layer, by_group, path, "load")
    assert path.read_bytes().startswith(PNG)
    left, right, bar = figure.axes
    assert left.images[0].get_array().tolist() == by_layer
    assert right.images[0].get_array().tolist() == list(by_group.values())
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 0.9)
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
        "by layer",
        "expert",
        "layer",
    )
    assert (right.get_title(), right.get_xlabel()) == ("by skill", "expert")
    assert [label.get_text() for label in right.get_yticklabels()] == ["sums", "dates"]
    assert bar.get_ylabel() == "share of tokens"
    assert figure.get_suptitle() == "load"
