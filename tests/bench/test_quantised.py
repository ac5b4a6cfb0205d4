from __future__ import annotations

import gc
from pathlib import Path

import loraloom
from benchmarks.memory_model import JobsSetting
from benchmarks.quantised import load_host, measure_peak
from tests.generation.saved import save_tiny

SETTING = JobsSetting("lora", rows=1, length=8, dtype="float32")


def test_no_weight_of_a_measured_base_is_read_from_its_file_later(tmp_path):
    base = save_tiny(tmp_path) / "base"
    host = load_host(str(base), "none", SETTING)
    gc.collect()
    assert str(base) not in Path("/proc/self/maps").read_text()
    assert host.adapters == {}


def test_the_peak_of_a_step_has_the_base_models_weights_in_it(tmp_path):
    base = str(save_tiny(tmp_path) / "base")
    model, _ = loraloom.load_base_model(base, "float32")
    peak = measure_peak(base, "none", SETTING)["peak_mb"]
    assert peak >= sum(weight.nbytes for weight in model.parameters()) / 1e6
