"""The comparison of all methods, on a tiny base model."""

import json
import runpy
from pathlib import Path

import pytest

import loraloom
from loraloom.adapters import CONFIGS
from tests.generation.saved import save_tiny

RECIPE = Path(__file__).parents[1] / "recipes" / "methods" / "run.py"


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def test_no_method_is_left_out(recipe):
    compared = {settings["method"] for settings in recipe["METHODS"].values()}
    known = {config.model_fields["method"].default for config in CONFIGS}
    assert compared == known - {"routed"}  # which learns nothing of its own


def test_methods_are_fitted_trained_tested_and_put_into_a_table(recipe, tmp_path, capsys):
    base = save_tiny(tmp_path / "saved") / "base"
    words = [f"--base-model={base}", f"--output={tmp_path / 'out'}", "--task=skills@1", "--rank=4"]
    words += ["--methods=lora,mixlora", "--at=size", "--steps=2", "--batch-size=4"]
    words += ["--rates=1e-3", "--search-seeds=100", "--seeds=0", "--limit=9"]
    recipe["main"](words)
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ("lora", "mixlora"))
    methods = json.loads((tmp_path / "out" / "size" / "result.json").read_text())["methods"]
    sizes = [method["parameters"] for method in methods.values()]
    model, _ = loraloom.load_base_model(str(base))
    host = loraloom.attach(model)

    def measured(name, rank, measure):
        settings = recipe["settings_of"](name, rank)
        return recipe["measured"](host, settings, recipe["MEASURES"][measure])

    assert sizes[0] == measured("lora", 4, "size")
    nearest = [abs(measured("mixlora", rank, "size") - sizes[0]) for rank in (1, 2, 3)]
    assert abs(sizes[1] - sizes[0]) == min(nearest)
    one, two, three = (measured("lora", rank, "compute") for rank in (1, 2, 3))
    assert two - one == three - two > 0
