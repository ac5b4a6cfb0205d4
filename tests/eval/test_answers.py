from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loraloom.errors import DataError
from loraloom.eval.comparison import read_answers
from loraloom.eval.evaluation import write_lines
from loraloom.eval.scores import QuestionScore, TaskScores
from tests.eval.scoring import question


def scores(task="toy", names=("base", "law"), right=(True, False, True)):
    asked = [
        QuestionScore(question("?", ["x", "y"], 0, index), (-1.0, -2.0 if correct else 0.0))
        for index, correct in enumerate(right)
    ]
    return TaskScores(task, "test", dict.fromkeys(names, asked))


def write_questions(path, tasks):
    write_lines(path, [line for task in tasks for line in task.lines()])


def test_answers_survive_their_file(tmp_path):
    tasks = [scores(), scores("other", right=(False,))]
    write_questions(tmp_path / "q.jsonl", tasks)
    expected = [task.answers for task in tasks]
    assert read_answers(tmp_path / "q.jsonl") == expected
    assert expected[0].right == {"base": (True, False, True), "law": (True, False, True)}
    assert expected[0].questions == (0, 1, 2)


def test_files_of_several_adapters_are_joined(tmp_path):
    write_questions(tmp_path / "a.jsonl", [scores(names=["base", "a"])])
    write_questions(tmp_path / "b.jsonl", [scores(names=["base", "b"])])
    (task,) = read_answers(tmp_path / "a.jsonl", str(tmp_path / "b.jsonl"))
    assert list(task.right) == ["base", "a", "b"]


def test_other_answers_under_the_same_name_are_an_error(tmp_path):
    write_questions(tmp_path / "a.jsonl", [scores()])
    write_questions(tmp_path / "b.jsonl", [scores(right=(False, False, True))])
    with pytest.raises(DataError, match=r"b.jsonl: 'base' must have the answers to toy that it"):
        read_answers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_other_questions_are_an_error(tmp_path):
    write_questions(tmp_path / "a.jsonl", [scores(names=["a"])])
    write_questions(tmp_path / "b.jsonl", [scores(names=["b"], right=(True,))])
    with pytest.raises(DataError, match="toy: adapters must have been asked the same questions"):
        read_answers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


LINE = {"task": "t", "index": 0, "question": "f", "adapter": "a", "correct": True}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE | {"correct": None}], "line 1: field 'correct' must be true or false, got None"),
        ([{"task": "t", "index": 0, "adapter": "a"}], "field 'correct' must be true or false"),
        (
            [LINE] * 2,
            "line 2: 'a' must answer question 0 of t once, got it again",
        ),
    ],
)
def test_a_line_that_can_not_be_used_is_named(tmp_path, lines, message):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        read_answers(path)


def test_another_question_at_the_same_place_is_an_error(tmp_path):
    first, second = scores(names=["a"]), scores(names=["b"])
    other = [
        QuestionScore(replace(score.question, contexts=("!", "!")), score.log_likelihoods)
        for score in second.scores["b"]
    ]
    write_questions(tmp_path / "a.jsonl", [first])
    write_questions(tmp_path / "b.jsonl", [replace(second, scores={"b": other})])
    with pytest.raises(DataError, match="got another question 0 of 'b' than of 'a'; take files of"):
        read_answers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_filters_of_generated_answers_are_tasks_of_their_own(tmp_path):
    line = {"task": "sums", "index": 0, "question": "f", "adapter": "a"}
    lines = [
        {**line, "filter": "strict", "correct": False},
        {**line, "filter": "flexible", "correct": True},
        {**line, "task": "choice", "filter": "none", "correct": True},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = {task.task: task.right["a"] for task in read_answers(path)}
    assert answers == {"sums,strict": (False,), "sums,flexible": (True,), "choice": (True,)}
