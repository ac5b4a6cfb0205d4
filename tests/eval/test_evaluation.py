from pathlib import Path

import pytest

from loraloom.data.tasks import QuestionSet
from loraloom.errors import AdapterError, ConfigError
from loraloom.eval.evaluation import evaluate, load_question_sets
from loraloom.eval.results import read_evaluation
from loraloom.eval.score import score_accuracy
from tests.eval.scoring import scoring_host, some_questions
from tests.generation.saved import write_rows

ROW = {
    "question": "What color is the sky?",
    "choices": {"text": ["blue", "the red one"], "label": ["A", "B"]},
    "answerKey": "A",
}
TOY = QuestionSet("toy", "test", "text", some_questions(), {"generated": "here"})


@pytest.fixture(scope="module")
def host():
    return scoring_host()


def test_everybody_is_scored_and_compared_by_default(host, tiny_tokenizer):
    evaluation = evaluate(host, tiny_tokenizer, TOY)
    assert list(evaluation.results) == ["base", *host.adapters]
    expected = score_accuracy(host, tiny_tokenizer, some_questions(), [None, "lora"])
    assert evaluation.results["base"]["toy"]["accuracy"] == expected[None]
    assert evaluation.results["lora"]["toy"]["accuracy"] == expected["lora"]
    assert list(evaluation.routing) == ["mixlora", "mixdora"]
    assert ("lora", "base") in [(one.first, one.second) for one in evaluation.comparisons]


@pytest.mark.parametrize("tasks", ["arc_easy", [Path("arc_easy")]])
def test_tasks_have_names_and_generated_ones_read_no_data(host, tiny_tokenizer, tmp_path, tasks):
    (tmp_path / "arc_easy").mkdir()
    write_rows(tmp_path / "arc_easy" / "test.jsonl", *[ROW] * 3)
    options = {"data": tmp_path, "limit": 2, "scoring": "text"}
    evaluation = evaluate(host, tiny_tokenizer, tasks, ["lora"], **options)
    assert evaluation.results["lora"]["arc_easy"]["num_examples"] == 2
    assert evaluation.tasks["arc_easy"]["scoring"] == "text"
    sets = load_question_sets(["skills", "arc_easy"], "text", data=tmp_path, limit=1)
    assert [len(one.questions) for one in sets] == [1, 1]


@pytest.mark.parametrize(
    ("tasks", "adapters", "pairs", "error", "message"),
    [
        ([TOY], [], None, AdapterError, "adapters must name at least one"),
        ([TOY], [None, "base"], None, AdapterError, "'base' is reserved for the base model"),
        ([], ["lora"], None, ConfigError, "at least one task or data set, got none"),
        ([TOY, TOY], ["lora"], None, ConfigError, "must have different names, got toy, toy"),
        ([TOY], ["lora"], [("lora", "lroa")], ConfigError, "must be one of lora, got 'lroa'"),
    ],
)
def test_what_results_could_not_tell_is_found_before_anything_is_scored(
    host, tiny_tokenizer, monkeypatch, tasks, adapters, pairs, error, message
):
    monkeypatch.setattr(host, "hidden", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(error, match=message):
        evaluate(host, tiny_tokenizer, tasks, adapters, pairs=pairs)


def test_what_is_written_is_read_by_the_same_type(host, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"pairs": [("lora", "dora")], "command": "loraloom eval \udcff"}  # a name in Latin-1
    evaluation = evaluate(host, tiny_tokenizer, [TOY], ["lora", "dora"], **options)
    evaluation.write("~/result.json")
    read = read_evaluation(tmp_path / "result.json")
    assert read.to_json() == evaluation.to_json()
    assert read.results == evaluation.results
    assert [*map(str, read.comparisons)] == [*map(str, evaluation.comparisons)]
    with pytest.raises(ConfigError, match=r"must end in \.json, \.csv, got"):
        evaluation.write(tmp_path / "result.txt")


def test_a_diverged_adapter_is_an_error(tiny_tokenizer):
    host = scoring_host()
    for parameter in host.adapters["dora"].parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(AdapterError, match="from adapter 'dora' in toy, question 0"):
        evaluate(host, tiny_tokenizer, [TOY])


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["arc_easy", "piqa"], {"data": "nowhere"}, "without arc_easy, piqa"),
        (["arc_esay"], {}, "did you mean 'arc_easy'"),
    ],
)
def test_tasks_that_cannot_be_loaded_are_an_error(tasks, options, message):
    with pytest.raises(ConfigError, match=message):
        load_question_sets(tasks, **options)
