import json
import sys

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import datasets

from loraloom.cli.main import main
from loraloom.eval.results import read_evaluation
from loraloom.eval.statistics import read_answers
from tests.eval.harness.toy import write_tasks


@pytest.fixture
def run(saved, monkeypatch, tmp_path):
    """Run `loraloom eval` on the tiny model and the toy tasks."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    given = ["--base-model", str(saved / "base"), "--device=cpu", f"--harness-include={tmp_path}"]
    write_tasks(tmp_path)
    return lambda *words: main(["eval", *given, *words])


def test_tasks_are_scored_for_base_and_adapters(run, saved, tmp_path, capsys):
    adapters = [f"--adapter=a={saved / 'lora'}", f"--adapter=b={saved / 'mixlora'}"]
    result, lines = tmp_path / "out" / "result.json", tmp_path / "lines.jsonl"
    files = ["--output", str(result), "--per-question", str(lines)]
    words = "--harness toy_choice,toy_generate --limit 5 --num-fewshot 1 --batch-tokens 300"
    assert run(*words.split(), *adapters, *files) == 0
    written = json.loads(result.read_text())
    assert list(written["results"]) == ["base", "a", "b"]
    summary = written["results"]["b"]["toy_choice"]
    assert (summary["num_examples"], summary["num_fewshot"], summary["split"]) == (5, 1, "test")
    assert summary["accuracy"] == written["lm_eval"]["b"]["results"]["toy_choice"]["acc_norm,none"]
    low, high = summary["interval"]
    assert low < summary["accuracy"] < high
    assert written["base_model"] == str(saved / "base")
    assert len(lines.read_text().splitlines()) == 3 * 2 * 5
    assert read_evaluation(result).results["a"]["toy_choice"]["num_examples"] == 5
    choice, generated = read_answers(lines)
    shares = [sum(right) / 5 for right in (choice.right["b"], generated.right["b"])]
    assert shares == [summary["accuracy"], written["results"]["b"]["toy_generate"]["accuracy"]]
    output = capsys.readouterr().out
    assert "toy_choice" in output
    assert "exact_match" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--harness ,", "--harness must name at least one task"),
        ("--harness toy_choice --task arc_easy", "--task and --harness exclude each other"),
        ("--harness toy_choice --scoring text", "--scoring requires --task"),
        ("--harness toy_choice --split test", "--split requires --task or --dataset"),
        ("--harness toy_choice --harness-include nowhere", "--harness-include must be a directory"),
        ("--harness toy_choice --no-cache", "--no-cache requires --task or"),
        ("--task arc_easy", "--harness-include requires --harness"),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(run, refused, words, message):
    assert message in refused(run, words)


def test_a_missing_lm_eval_is_one_error(run, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "loraloom.eval.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run("--harness", "toy_choice") == 2
    assert "pip install 'loraloom[eval]'" in capsys.readouterr().err
