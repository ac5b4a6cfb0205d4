"""`loraloom eval` with its cache, comparisons and files."""

import csv
import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from loraloom.cli.main import main
from loraloom.data.sources import sha256
from loraloom.data.tasks import load_question_set, questions_digest
from loraloom.eval.statistics import compare, read_answers
from tests.generation.saved import read_rows, save_tiny, write_rows

ROWS = [
    {
        "question": f"What is {'one ' * number}?",
        "choices": {"text": list("aeimquc"[number % 5 :][:3]), "label": ["A", "B", "C"]},
        "answerKey": "ABC"[number % 3],
    }
    for number in range(12)
]
TASK_FILE = """
data: {files: {test: arc_easy/test.jsonl}}
template: "Question: {{ question }}\\nAnswer:"
choices: choices.text
labels: choices.label
answer: answerKey
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("saved"))
    (directory / "data" / "arc_easy").mkdir(parents=True)
    for split in ("test", "validation"):
        write_rows(directory / "data" / "arc_easy" / f"{split}.jsonl", *ROWS)
    (directory / "data" / "quiz.yaml").write_text(TASK_FILE)
    return directory


@pytest.fixture
def words(saved, tmp_path, monkeypatch):
    """The beginning of a command line that scores in batches of few questions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = f"--base-model {saved / 'base'} --device cpu --batch-tokens 256"
    return f"eval {base} --scoring text".split()


@pytest.fixture
def run(saved, words, tmp_path):
    """Run `loraloom eval` on two adapters; give the JSON file's content."""
    data = ["--task", "arc_easy", "--data", str(saved / "data")]
    adapters = [f"--adapter=a={saved / 'lora'}", f"--adapter=b={saved / 'mixlora'}"]

    def run(*more, task=data, adapters=adapters, code=0):
        output = tmp_path / "result.json"
        assert main([*words, *task, *adapters, "--output", str(output), *more]) == code
        return json.loads(output.read_text()) if code == 0 else None

    return run


def test_without_a_cache_nothing_is_kept(run, tmp_path):
    run("--no-cache")
    assert not (tmp_path / "cache").exists()


def test_results_are_written_before_they_are_printed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.cli.eval.print_tables", Mock(side_effect=BrokenPipeError))
    run("--per-question", str(tmp_path / "q.jsonl"), code=1)
    assert (tmp_path / "q.jsonl").exists()
    assert (tmp_path / "result.json").exists()


def test_the_file_says_how_results_were_got(run, saved):
    written = run("--limit", "5")
    data = saved / "data" / "arc_easy" / "test.jsonl"
    asked = load_question_set("arc_easy", "text", path=data, limit=5)
    assert written["schema_version"] == 1
    assert written["tasks"]["arc_easy"] == {
        "split": "test",
        "scoring": "text",
        "num_questions": 5,
        "questions_sha256": questions_digest(asked.questions),
        "source": {"file": str(data), "sha256": sha256(data)},
    }
    weights = saved / "lora" / "adapter_model.safetensors"
    assert written["adapters"]["a"]["path"] == str(saved / "lora")
    assert written["adapters"]["a"]["sha256"]["adapter_model.safetensors"] == sha256(weights)
    assert written["base_model"] == str(saved / "base")
    assert (written["dtype"], written["attention"], written["device"]) == ("float32", "sdpa", "cpu")
    assert set(written["versions"]) == {"loraloom", "python", "torch", "transformers"}
    assert written["date"].endswith("+00:00")


def test_base_and_adapters_are_scored_in_one_pass_and_compared(run, tmp_path, capsys):
    written = run("--per-question", str(tmp_path / "q.jsonl"))
    assert list(written["results"]) == ["base", "a", "b"]
    assert list(written["routing"]) == ["b"]
    assert written["routing"]["b"]["tasks"]["arc_easy"]["num_questions_covered"] == 12
    lines = read_rows(tmp_path / "q.jsonl")
    right = [line["chosen"] == line["correct_label"] for line in lines if line["adapter"] == "a"]
    assert written["results"]["a"]["arc_easy"]["accuracy"] == sum(right) / 12
    pairs = [(one["first"], one["second"]) for one in written["comparisons"]]
    assert pairs == [("a", "base"), ("b", "base"), ("a", "b")]
    (answers,) = read_answers(tmp_path / "q.jsonl")
    assert any(one["num_first_better"] for one in written["comparisons"])
    for one in written["comparisons"]:
        expected = compare(answers, one["first"], one["second"])
        assert one["difference"] == expected.difference
        assert one["p_value"] == expected.p_value
        assert one["interval"] == list(expected.interval)
    output = capsys.readouterr()
    assert "a - base" in output.out
    assert output.err == ""


def test_split_limit_and_base_can_be_chosen(run):
    options = ["--split", "validation", "--limit", "3", "--no-base", "--batch-tokens", "64"]
    results = run(*options)["results"]
    assert list(results) == ["a", "b"]
    assert results["a"]["arc_easy"]["num_examples"] == 3
    assert results["a"]["arc_easy"]["split"] == "validation"


def test_a_sum_is_scored_beside_its_adapters(run):
    results = run("--adapter", "a:1", "--adapter", "a:0")["results"]
    assert (results["a:1"], results["a:0"]) == (results["a"], results["base"])


def test_results_are_written_as_a_table(run, tmp_path):
    written = run("--output", str(tmp_path / "out" / "result.csv"))
    rows = list(csv.DictReader((tmp_path / "out" / "result.csv").read_text().splitlines()))
    assert [row["adapter"] for row in rows] == ["base", "a", "b"]
    for row in rows:
        result = written["results"][row["adapter"]]["arc_easy"]
        assert float(row["accuracy"]) == result["accuracy"]
        assert [float(row["low"]), float(row["high"])] == result["interval"]


def test_a_task_file_is_scored_as_the_built_in_task(run, saved):
    built_in = run()["results"]["a"]["arc_easy"]
    written = run(task=["--task", str(saved / "data" / "quiz.yaml")])
    assert written["results"]["a"]["quiz"] == built_in
    assert written["num_cached_scores"] == 36  # the same tokens
    assert Path(written["tasks"]["quiz"]["source"]["task_file"]).name == "quiz.yaml"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--task boolq --compare a:c", "--compare must be FIRST:SECOND, two of base, got 'a:c'"),
        (
            "--task boolq --adapter mix@0=x --adapter mix@1=x --adapter mix=x",
            "'mix' is also the name of the seeds mix@0",
        ),
        ("--task nowhere.yaml", "nowhere.yaml can't be read: No such file"),
        ("--task arc_esay", "did you mean 'arc_easy'?"),
        ("--task arc_easy --format chat", "--format requires --dataset"),
        ("--dataset a.jsonl --task arc_easy", "--task and --dataset exclude each other"),
        ("--dataset a.jsonl", "--data requires --task"),
        ("--task ,", "--task must name at least one task"),
        ("--task arc_easy --no-base", "--no-base requires --adapter"),
        ("--task piqa", "has no split 'validation'"),
        ("--task arc_easy --split train", "has no split 'train'"),
        ("--task arc_easy --data nowhere", "nowhere"),
        ("--task arc_easy --adapter a=nowhere", "or a Hub ID, got 'nowhere'"),
        ("--task arc_easy --adapter nowhere", "--adapter must be NAME=PATH"),
        ("--task arc_easy --base-model ./nowhere", "./nowhere"),
        ("--task arc_easy --output .", "--output must end in .json, .csv, got ."),
        ("--task arc_easy --num-fewshot 0", "--num-fewshot requires --harness"),
        ("--task arc_easy,piqa", "data must be a directory with a subdirectory per task"),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(run, refused, saved, line, message):
    assert message in refused(run, line, task=["--data", str(saved / "data")], adapters=[], code=2)
