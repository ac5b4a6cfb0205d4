from __future__ import annotations

import json
import math

import pytest

from loraloom.errors import AdapterError
from loraloom.eval.scores import QuestionScore, TaskScores, summarise
from loraloom.eval.statistics import wilson_interval
from tests.eval.scoring import question


def toy(group=None, task="toy", values=((-1.0, -2.0), (-1.0, -2.0))):
    golds = (0, 1)
    scores = [
        QuestionScore(question("?", ["x", "y"], gold, index, group), tuple(value))
        for index, (gold, value) in enumerate(zip(golds, values, strict=True))
    ]
    return TaskScores(task, "test", {"base": scores, "law": scores[:1]})


def test_results_are_by_adapter_and_task():
    results = summarise([toy(), toy(task="other")])
    assert list(results) == ["base", "law"]
    assert results["base"]["toy"] == {
        "accuracy": 0.5,
        "stderr": 0.5,
        "num_examples": 2,
        "majority": 0.5,
        "beats_majority": False,
        "interval": list(wilson_interval(0.5, 2)),
        "split": "test",
    }
    assert results["law"]["other"]["stderr"] is None


def test_groups_have_results_of_their_own():
    groups = summarise([toy(group="sums")])["base"]["toy"]["groups"]
    assert list(groups) == ["sums"]
    assert groups["sums"]["accuracy"] == groups["sums"]["majority"] == 0.5
    assert groups["sums"]["interval"] == list(wilson_interval(0.5, 2))


def test_truncated_questions_are_counted():
    scores = [QuestionScore(question("?", ["x", "y"]), (-1.0, -2.0), truncated=True)]
    assert (
        summarise([TaskScores("toy", "test", {"base": scores})])["base"]["toy"]["num_truncated"]
        == 1
    )


def test_every_question_has_a_line():
    lines = [json.loads(json.dumps(line)) for line in toy().lines()]
    assert [(line["adapter"], line["index"]) for line in lines] == [
        ("base", 0),
        ("base", 1),
        ("law", 0),
    ]
    assert lines[0]["question"] == lines[2]["question"] != lines[1].pop("question")
    assert lines[1] == {
        "task": "toy",
        "split": "test",
        "index": 1,
        "adapter": "base",
        "correct": False,
        "chosen": "A",
        "correct_label": "B",
        "scores": [-1.0, -2.0],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_an_error(value):
    scores = toy(values=((-1.0, -2.0), (-1.0, value)))
    with pytest.raises(AdapterError, match="from the base model in toy, question 1"):
        scores.check_finite()
    toy().check_finite()


def test_the_error_names_the_adapter():
    scores = {"law": toy(values=((math.nan, -2.0), (0.0, 0.0))).scores["law"]}
    with pytest.raises(AdapterError, match="from adapter 'law' in toy, question 0"):
        TaskScores("toy", "test", scores).check_finite()
