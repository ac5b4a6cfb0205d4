from __future__ import annotations

import math

import pytest

from loraloom.eval.plots import plot_experts, plot_loss_curves, smoothed

PNG = b"\x89PNG"


def points(line):
    return list(zip(*line.get_data(), strict=True))


def test_a_loss_curve_is_drawn_raw_and_smoothed(tmp_path):
    path = tmp_path / "new" / "loss.png"
    curves = {"a": [(1, 2.0), (2, 1.0), (3, 0.5)], "b": [(1, 3.0)]}
    (axes,) = plot_loss_curves(curves, path).axes
    assert path.read_bytes().startswith(PNG)
    raw_a, smooth_a, raw_b, smooth_b = axes.lines
    assert points(raw_a) == curves["a"]
    assert points(smooth_a) == smoothed(curves["a"], 0.8)
    assert points(raw_b) == points(smooth_b) == curves["b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_a_running_mean_starts_at_the_first_value_and_skips_what_is_not_finite():
    curve = [(1, 4.0), (2, math.nan), (3, 4.0), (4, math.inf)]
    assert smoothed(curve, 0.9) == [(1, pytest.approx(4)), (3, pytest.approx(4))]


def test_experts_are_drawn_by_layer(tmp_path):
    path = tmp_path / "experts.png"
    load, by_topic = [[0.5, 0.5], [0.9, 0.1]], {"sums": [0.25, 0.75], "dates": [0.6, 0.4]}
    information = {"about the skill": [0.1, 0.3], "about the token": [0.2, 0.0]}
    figure = plot_experts(load, by_topic, information, path, "experts")
    assert path.read_bytes().startswith(PNG)
    left, middle, right, *_ = figure.axes
    assert left.images[0].get_array().tolist() == load
    assert middle.images[0].get_array().tolist() == [[0.25, 0.6], [0.75, 0.4]]
    assert [label.get_text() for label in middle.get_xticklabels()] == ["sums", "dates"]
    assert [points(line) for line in right.lines] == [[(0.1, 0), (0.3, 1)], [(0.2, 0), (0.0, 1)]]
    assert [text.get_text() for text in right.get_legend().get_texts()] == list(information)
