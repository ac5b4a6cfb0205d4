from __future__ import annotations

import pytest

from loraloom.eval.sweep_plot import plot_sweep

CURVES = {"a": [(4, 2.0), (8, 1.0)], "b": [(4, 3.0)], "c": [(4, 2.5), (8, 1.5)]}
RATES = {"a": 1e-5, "b": 1e-4, "c": 1e-2}
METHODS = {"a": "lora", "b": "mixlora", "c": "lora"}


@pytest.fixture
def axes(tmp_path):
    parameters = {
        job: {"train.learning_rate": RATES[job], "adapter.method": METHODS[job], "seed": 1}
        for job in CURVES
    }
    path = tmp_path / "sweep.png"
    figure = plot_sweep(CURVES, parameters, {"b"}, "eval/loss", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return figure.axes


def points(line):
    return list(zip(*line.get_data(), strict=True))


def test_every_job_has_a_course_and_those_that_were_stopped_end_in_a_cross(axes):
    left = axes[0]
    lines = {line.get_label(): line for line in left.lines}
    assert {name: points(line) for name, line in lines.items()} == CURVES
    assert {name: line.get_marker() for name, line in lines.items()} == {
        "a": "o",
        "b": "x",
        "c": "o",
    }
    assert lines["b"].get_color() == "0.6"
    assert left.lines[-1] is lines["a"]  # the best above the others
    assert (left.get_xlabel(), left.get_ylabel()) == ("step", "eval/loss")
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a", "c"]


def test_each_parameter_has_a_panel_of_last_values(axes):
    _, rate, method, seed = axes
    assert [one.get_xlabel() for one in axes[1:]] == [
        "train.learning_rate",
        "adapter.method",
        "seed",
    ]
    last = {job: curve[-1][1] for job, curve in CURVES.items()}
    assert [points(line) for line in rate.lines] == [[(RATES[job], last[job])] for job in CURVES]
    assert [points(line) for line in method.lines] == [[(0, 1.0)], [(1, 3.0)], [(0, 1.5)]]
    assert [points(line) for line in seed.lines] == [[(1, last[job])] for job in CURVES]


def test_numbers_far_apart_have_a_logarithmic_axis_and_words_their_names(axes):
    _, rate, method, seed = axes
    assert (rate.get_xscale(), method.get_xscale(), seed.get_xscale()) == ("log",) + ("linear",) * 2
    assert [label.get_text() for label in method.get_xticklabels()] == ["lora", "mixlora"]
