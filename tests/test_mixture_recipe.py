"""The search for each method's rate, its seeds and its scores, on a tiny base model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.infer.saved import save_tiny

RECIPE = Path(__file__).parents[1] / "recipes" / "mixture"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    base = save_tiny(tmp_path_factory.mktemp("saved")) / "base"
    settings = ["train.max_steps=2", "train.batch_size=4", "train.max_length=128", "eval.0.limit=9"]
    return [
        *(str(RECIPE / "tiny.yaml"), f"--set=base_model={base}", "--task=skills@1", "--limit=9"),
        *(f"--each={setting}" for setting in settings),
        *("--only=mixlora,lora-size", "--rates=1e-3,1e-2", "--search-seeds=100", "--seeds=0,1"),
    ]


def test_a_study_goes_on_where_it_was_interrupted_and_makes_a_table(words, tmp_path, monkeypatch):
    recipe, table = (runpy.run_path(str(RECIPE / name)) for name in ("run.py", "table.py"))
    output = tmp_path / "study"

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setitem(recipe["main"].__globals__, "score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recipe["main"]([*words, f"--output={output}"])
    monkeypatch.setitem(recipe["main"].__globals__, "train", interrupt)  # nothing is trained again
    recipe["main"]([*words, f"--output={output}"])
    result = json.loads((output / "result.json").read_text())
    assert list(result["methods"]) == ["mixlora", "lora-size"]
    for method in result["methods"].values():
        assert len(method["accuracies"]) == 2
        assert method["rate"] in (1e-3, 1e-2)
        assert set(method["searched"]) == {"0.001", "0.01"}
    (compared,) = result["comparisons"]
    means = [method["mean"] for method in result["methods"].values()]
    assert compared["over_seeds"]["mean"] == pytest.approx(means[0] - means[1])
    assert compared["over_questions"]["difference"] == pytest.approx(means[0] - means[1])

    (study,) = table["read_studies"]([tmp_path])
    rows = list(table["table"]([study]))
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split(" | ")[1] for row in rows[2:]] == ["base model", "mixlora", "lora-size"]
    assert [line["method"] for line in table["lines"](study)] == ["mixlora", "lora-size"]

    with pytest.raises(SystemExit, match="begun with other settings"):
        recipe["main"]([*words, f"--output={output}", "--limit=8"])


def test_a_study_takes_jobs_that_there_are(words, tmp_path):
    recipe = runpy.run_path(str(RECIPE / "run.py"))
    with pytest.raises(SystemExit, match=r"--only must name jobs of .*, got lora"):
        recipe["main"]([*words, f"--output={tmp_path}", "--only=lora"])
