from __future__ import annotations

import json
import math

import pytest

from loraloom.eval.plots import plot_expert_load, plot_loss_curves, read_curve

PNG = b"\x89PNG"


def test_a_curve_has_the_lines_that_carry_its_figure(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval/loss": 1.5}, {"step": 2, "loss": 1.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(path, "loss") == [(1, 2.0), (2, 1.0)]
    assert read_curve(path, "eval/loss") == [(1, 1.5)]


@pytest.mark.parametrize("last", [0.5, math.nan])
def test_loss_curves_become_a_picture(tmp_path, last):
    path = tmp_path / "new" / "loss.png"
    plot_loss_curves({"a": [(1, 2.0), (2, last)], "b": [(1, 3.0)]}, path)
    assert path.read_bytes().startswith(PNG)


def test_expert_load_becomes_a_picture(tmp_path):
    path = tmp_path / "load.png"
    plot_expert_load([[0.5, 0.5], [1.0, 0.0]], {"sums": [0.25, 0.75]}, path, "load")
    assert path.read_bytes().startswith(PNG)
