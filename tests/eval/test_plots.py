from __future__ import annotations

import math

import pytest

from loraloom.eval.plots import plot_expert_load, plot_loss_curves

PNG = b"\x89PNG"


@pytest.mark.parametrize("last", [0.5, math.nan])
def test_loss_curves_become_a_picture(tmp_path, last):
    path = tmp_path / "new" / "loss.png"
    plot_loss_curves({"a": [(1, 2.0), (2, last)], "b": [(1, 3.0)]}, path)
    assert path.read_bytes().startswith(PNG)


def test_expert_load_becomes_a_picture(tmp_path):
    path = tmp_path / "load.png"
    plot_expert_load([[0.5, 0.5], [1.0, 0.0]], {"sums": [0.25, 0.75]}, path, "load")
    assert path.read_bytes().startswith(PNG)
