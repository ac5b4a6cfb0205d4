from __future__ import annotations

from loraloom.eval.sweep_plot import plot_sweep


def test_a_sweep_becomes_a_picture(tmp_path):
    curves = {"a": [(4, 2.0), (8, 1.0)], "b": [(4, 3.0)], "c": [(4, 2.5), (8, 1.5)]}
    methods = ["lora", "mixlora", "lora"]
    parameters = {
        name: {"train.learning_rate": rate, "adapter.method": method, "seed": 1}
        for name, rate, method in zip(curves, (1e-5, 1e-4, 1e-2), methods, strict=True)
    }
    path = tmp_path / "sweep.png"
    plot_sweep(curves, parameters, {"b"}, "eval/loss", path)
    assert path.read_bytes().startswith(b"\x89PNG")
