"""The search for each method's rate, its seeds and its scores, on a tiny base model."""

import json
import runpy
from pathlib import Path

import pytest

from tests.generation.saved import save_tiny

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

    recipe["main"]([*words, f"--output={output}", "--search-only"])
    assert len([*output.glob("search-*.json")]) == 2
    assert not (output / "seeds").exists()
    with monkeypatch.context() as patched:
        patched.setitem(recipe["main"].__globals__, "search", interrupt)  # nor is it done again
        patched.setitem(recipe["main"].__globals__, "score", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recipe["main"]([*words, f"--output={output}"])
    assert (output / "trained.json").exists()
    monkeypatch.setitem(recipe["main"].__globals__, "train", interrupt)  # nothing is trained again
    recipe["main"]([*words, f"--output={output}"])
    result = json.loads((output / "result.json").read_text())
    assert list(result["methods"]) == ["mixlora", "lora-size"]
    for method in result["methods"].values():
        assert len(method["accuracy"]["values"]) == len(method["train_loss"]["values"]) == 2
        assert method["rate"] in (1e-3, 1e-2)
        assert set(method["searched"]) == {"0.001", "0.01"}
    (compared,) = result["comparisons"]
    means = [method["accuracy"]["mean"] for method in result["methods"].values()]
    assert compared["over_seeds"]["accuracy"]["mean"] == pytest.approx(means[0] - means[1])
    assert compared["over_questions"]["difference"] == pytest.approx(means[0] - means[1])

    (study,) = table["read_studies"]([tmp_path])
    rows = list(table["table"]([study]))
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split(" | ")[1] for row in rows[2:]] == ["mixlora", "lora-size", "base model"]
    assert [line["method"] for line in table["lines"](study)] == ["mixlora", "lora-size"]

    with pytest.raises(SystemExit, match="begun with other settings"):
        recipe["main"]([*words, f"--output={output}", "--limit=8"])


def test_a_study_of_a_data_set_is_by_loss(words, tmp_path):
    recipe, table = (runpy.run_path(str(RECIPE / name)) for name in ("run.py", "table.py"))
    make = runpy.run_path(str(RECIPE / "instructions.py"))["main"]
    data, run_file = tmp_path / "data", tmp_path / "run.yaml"
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n}"} for n in range(600)]
    rows += [
        {"instruction": "Say 1.", "output": "2"},
        {"instruction": "Why?", "output": "so" * 300},
    ]
    alpaca, dolly = tmp_path / "alpaca.jsonl", tmp_path / "dolly.jsonl"
    alpaca.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dolly.write_text('{"instruction": "Say it.", "context": "sun", "response": "sun"}\n')
    make([str(alpaca), str(dolly), f"--output={data}"])
    made = [
        json.loads(line) for path in data.glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(made) == 601
    assert {"instruction": "Say it.", "input": "sun", "output": "sun"} in made
    assert rows[1] in made

    settings = (RECIPE / "instructions.yaml").read_text()
    run_file.write_text(settings.replace("runs/mixture/instructions", str(data)))
    changes = ["train.max_steps=2", "train.batch_size=4", "train.micro_batch_size=4"]
    small = [f"--each={change}" for change in changes]
    options = [*words[1:2], *small, *words[-4:], f"--output={tmp_path / 'study'}"]
    recipe["main"]([str(run_file), *options, "--limit=9"])
    (study,) = table["read_studies"]([tmp_path / "study"])
    for method in study["methods"].values():
        assert set(method["searched"]) == {"0.001", "0.01"}
        assert "accuracy" not in method
        assert len(method["loss"]["values"]) == len(method["train_loss"]["values"]) == 2
    (compared,) = study["comparisons"]
    assert compared["over_questions"]["metric"] == "loss"
    means = [method["loss"]["mean"] for method in study["methods"].values()]
    assert compared["over_seeds"]["loss"]["mean"] == pytest.approx(means[0] - means[1])
    assert len({row.count("|") for row in list(table["table"]([study]))}) == 1

    with pytest.raises(SystemExit, match="without eval"):
        recipe["main"]([str(run_file), *options, "--each=data.validation=null"])
