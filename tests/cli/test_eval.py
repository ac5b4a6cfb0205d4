from __future__ import annotations

import json

import pytest

from loraloom.cli import eval as verb
from loraloom.cli import main as cli
from tests.generation.saved import save_tiny

ROWS = [
    {
        "id": str(number),
        "question": f"What is {number}?",
        "choices": {"text": ["one", "two", "the sky"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[number % 3],
    }
    for number in range(7)
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("saved"))
    (directory / "data" / "arc_easy").mkdir(parents=True)
    text = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    for split in ("test", "validation"):
        (directory / "data" / "arc_easy" / f"{split}.jsonl").write_text(text)
    return directory


@pytest.fixture
def run(saved, monkeypatch):
    """Run `loraloom eval` on the tiny model and data; a later option goes before an earlier one."""
    monkeypatch.setitem(cli.VERBS, "eval", (verb.evaluate, "Score."))
    given = ["--base-model", str(saved / "base"), "--data", str(saved / "data")]
    return lambda *words: cli.main(["eval", *given, "--device", "cpu", *words])


def test_base_and_adapters_are_scored_in_one_pass(run, saved, tmp_path, capsys):
    adapters = [f"--adapter=a={saved / 'lora'}", f"--adapter=b={saved / 'mixlora'}"]
    result, lines = tmp_path / "out" / "result.json", tmp_path / "lines.jsonl"
    files = ["--output", str(result), "--per-question", str(lines)]
    assert run("--task", "arc_easy", *adapters, *files, "--scoring", "text") == 0
    written = json.loads(result.read_text())
    assert list(written["results"]) == ["base", "a", "b"]
    summary = written["results"]["a"]["arc_easy"]
    assert (summary["num_examples"], summary["split"]) == (7, "test")
    assert written["tasks"]["arc_easy"]["scoring"] == "text"
    assert written["base_model"] == str(saved / "base")
    assert written["command"].startswith("loraloom")
    assert list(written["routing"]) == ["b"]
    assert written["routing"]["b"]["tasks"]["arc_easy"]["num_questions_covered"] == 7
    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(answers) == 21
    right = [answer["chosen"] == answer["correct_label"] for answer in answers[7:14]]
    assert summary["accuracy"] == sum(right) / 7
    output = capsys.readouterr()
    assert "arc_easy" in output.out
    assert output.err == ""


def test_split_limit_and_base_can_be_chosen(run, saved, tmp_path):
    options = ["--split", "validation", "--limit", "3", "--no-base", "--batch-tokens", "64"]
    adapter = ["--adapter", f"a={saved / 'lora'}"]
    output = ["--output", str(tmp_path / "r.json")]
    assert run("--task", "arc_easy", *options, *adapter, *output) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert list(results) == ["a"]
    assert results["a"]["arc_easy"]["num_examples"] == 3
    assert results["a"]["arc_easy"]["split"] == "validation"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task arc_esay", "did you mean 'arc_easy'?"),
        ("--task arc_easy --format chat", "--format has an effect with --dataset only"),
        ("--dataset a.jsonl --task arc_easy", "--task has no effect with --dataset"),
        ("--dataset a.jsonl --scoring text", "--data has an effect with --task only"),
        ("--task ,", "--task must name at least one task"),
        ("--task arc_easy --no-base", "--no-base leaves nothing to score"),
        ("--task piqa", "no data set 'piqa' there"),
        ("--task arc_easy --split train", "no split 'train' there"),
        ("--task arc_easy --data nowhere", "nowhere"),
        ("--task arc_easy --adapter a=nowhere", "there is no nowhere"),
        ("--task arc_easy --adapter nowhere", "--adapter must be NAME=PATH"),
        ("--task arc_easy --base-model ./nowhere", "./nowhere"),
        ("--task arc_easy --output .", "--output must end in .json, .csv, got ."),
        ("--task arc_easy --num-fewshot 0", "--num-fewshot has an effect with --harness only"),
        (
            "--task arc_easy,piqa",
            "data must be a directory with one for each of several tasks, got",
        ),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(
    run, monkeypatch, capsys, words, message
):
    from loraloom.generation import loading

    monkeypatch.setattr(loading, "load_base_model", lambda *_: pytest.fail("loaded"))
    assert run(*words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
