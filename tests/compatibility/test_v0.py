"""What version 0.1.0 wrote is read and run by this one; `make.py` made the copies."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraloom
from loraloom.base.loading import load_base_model
from loraloom.cli.main import main as loraloom_command
from loraloom.eval.statistics import read_answers
from tests.generation.saved import read_rows

COPIES = Path(__file__).parent / "v0"
METHODS = ("lora", "dora", "mixlora", "mixdora")


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The copies in a directory of their own, where a command runs."""
    shutil.copytree(COPIES, tmp_path / "copies")
    monkeypatch.chdir(tmp_path / "copies")
    return Path()


@pytest.mark.parametrize("name", ["base", *METHODS])
def test_adapters_compute_the_logits_that_they_did(name):
    expected = load_file(COPIES / "logits.safetensors")
    model, _ = load_base_model(str(COPIES / "base"), "float32")
    host = loraloom.attach(model)
    adapter = None
    if name != "base":
        adapter = host.load(name, COPIES / "runs" / name).name
    with torch.no_grad():
        logits = host(input_ids=expected["input_ids"], adapters=[adapter]).logits[0]
    assert (logits - expected[name]).norm() < 1e-5 * expected[name].norm()


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_written_again_has_the_same_tensors_and_settings(name, copies):
    model, _ = load_base_model("base", "float32")
    host = loraloom.attach(model)
    host.load(name, f"runs/{name}")
    host.save(name, "again")
    tensors, expected = (
        load_file(f"{path}/adapter_model.safetensors") for path in ("again", f"runs/{name}")
    )
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected.items())
    settings, before = (
        json.loads((copies / path / "adapter_config.json").read_text())
        for path in ("again", f"runs/{name}")
    )
    if "loraloom" in before:
        after_base, before_base = settings["loraloom"]["base"], before["loraloom"]["base"]
        assert after_base.pop("fingerprint") == host.base.fingerprint
        before_base.pop("fingerprint")  # in another form
    assert_holds(settings, before)


def test_the_run_file_trains_as_it_did_and_writes_what_it_did(copies):
    shutil.move("runs", "before")
    assert loraloom_command(["train", "run.yaml"]) == 0
    for name in METHODS:
        after = read_rows(copies / "runs" / name / "metrics.jsonl")
        before = read_rows(copies / "before" / name / "metrics.jsonl")
        assert [line.get("step") for line in after] == [line.get("step") for line in before]
        assert all(old.keys() <= new.keys() for old, new in zip(before, after, strict=True))
        first, expected = (
            next(line for line in lines if "loss" in line) for lines in (after, before)
        )
        assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        result = json.loads((copies / "runs" / name / "result.json").read_text())
        expected = json.loads((copies / "before" / name / "result.json").read_text())
        assert expected.keys() <= result.keys()
        same = ("job", "status", "method", "num_parameters", "steps", "tokens", "weights", "data")
        assert {key: result[key] for key in same} == {key: expected[key] for key in same}
        assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-2)


def test_one_step_after_another_adapter_begins_with_its_weights(copies):
    changes = ["jobs.3.start_from=runs/mixdora", "jobs.3.train.max_steps=1", "output_dir=next"]
    assert loraloom_command(["train", "run.yaml", *(f"--set={change}" for change in changes)]) == 0
    first = read_rows(copies / "next/mixdora/metrics.jsonl")[0]["loss"]
    assert first < read_rows(copies / "runs/mixdora/metrics.jsonl")[0]["loss"]


def test_results_are_in_the_way_of_a_run_as_they_were(copies, capsys):
    assert loraloom_command(["train", "run.yaml"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert loraloom_command(["train", "run.yaml", "--resume"]) == 2
    assert "--resume requires checkpoints" in capsys.readouterr().err
    assert loraloom_command(["train", "run.yaml", "--overwrite"]) == 0


def assert_holds(after: Any, before: Any) -> None:
    """Hold results to former ones, which may have had fewer fields."""
    if isinstance(before, dict):
        for key, value in before.items():
            assert_holds(after[key], value)
    elif isinstance(before, float):
        assert after == pytest.approx(before, rel=1e-12)
    elif isinstance(before, list):
        for one, former in zip(after, before, strict=True):
            assert_holds(one, former)
    else:
        assert after == before


def test_an_evaluation_gives_the_results_that_it_gave(copies):
    words = "--base-model=base --task=arc_easy --scoring=text --data=. --device=cpu".split()
    words += ["--no-cache", "--dtype=float32"]
    files = ["--output=new.json", "--output=new.csv", "--per-question=new.jsonl"]
    adapters = [f"--adapter={name}=runs/{name}" for name in METHODS]
    assert loraloom_command(["eval", *words, *files, *adapters]) == 0
    after, before = (json.loads(Path(name).read_text()) for name in ("new.json", "evaluation.json"))
    assert before.keys() - {"compat"} <= after.keys()
    for key in ("schema_version", "results", "seeds", "comparisons", "tasks"):
        assert_holds(after[key], before[key])
    assert after["routing"].keys() == before["routing"].keys()
    for name, routing in before["routing"].items():
        assert routing.keys() - {"similarity", "words"} <= after["routing"][name].keys()
    assert after["adapters"] == before["adapters"]
    answers, expected = read_rows(Path("new.jsonl")), read_rows(Path("answers.jsonl"))
    for answer, old in zip(answers, expected, strict=True):
        assert answer.pop("scores") == pytest.approx(old.pop("scores"), rel=1e-4)
        assert answer == old
    tables = [
        list(csv.DictReader(Path(name).read_text().splitlines()))
        for name in ("new.csv", "evaluation.csv")
    ]
    assert_holds(*tables)


def test_answers_are_read_for_comparisons():
    (task,) = read_answers(COPIES / "answers.jsonl")
    assert list(task.right) == ["base", *METHODS]
    assert len(task.questions) == 7


def test_report_shows_a_run_and_its_evaluation(copies):
    assert loraloom_command(["report", "runs", "--eval", "evaluation.json"]) == 0
    page = (copies / "runs/report.html").read_text()
    for name in METHODS:
        assert name in page
    assert "Where mixtures send tokens" in page
    assert "arc_easy" in page


@pytest.mark.parametrize("name", METHODS)
def test_inspect_describes_an_adapter(name, capsys):
    assert loraloom_command(["inspect", str(COPIES / "runs" / name), "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["num_parameters"]
        == json.loads((COPIES / "runs" / name / "result.json").read_text())["num_parameters"]
    )
