import pytest

from loraloom.errors import ConfigError, DataError
from loraloom.eval.evaluation import summarise
from loraloom.eval.results import write_lines
from loraloom.eval.statistics import (
    TaskAnswers,
    choose_pairs,
    compare,
    compare_paired,
    read_answers,
    seed_groups,
    seed_values,
    summarise_seeds,
)
from tests.eval.scoring import toy_scores

ANSWERS = TaskAnswers(
    "toy",
    (0, 1, 2, 3),
    {
        "base": (False, False, True, False),
        "mix@0": (True, False, True, True),
        "mix@1": (True, True, False, True),
        "lora": (True, False, False, False),
    },
)
NAMES = list(ANSWERS.right)
WRONG = ((-1.0, -2.0), (-2.0, -1.0))  # other answers than the usual ones


def test_adapters_with_an_at_are_seeds_of_what_stands_before_it():
    assert seed_groups(NAMES) == {"mix": ["mix@0", "mix@1"]}
    assert seed_groups(["mix@0", "lora"]) == {}  # a single seed is no group
    assert seed_groups(["law@small", "law@large"]) == {}  # nor are other words numbers
    experts = ["mix@0/law", "mix@1/law"]
    assert seed_groups([*NAMES, *experts]) == {"mix": ["mix@0", "mix@1"], "mix/law": experts}


@pytest.mark.parametrize("name", ["mix", "base"])
def test_a_group_must_not_have_an_adapters_name(name):
    seeds = [f"{name}@0", f"{name}@1"]
    with pytest.raises(ConfigError, match=f"{name!r} is also the name .* {', '.join(seeds)};"):
        choose_pairs([name, *seeds], [f"{name}:{name}@0"])


def test_everybody_is_compared_with_the_base_model_and_few_with_each_other():
    assert choose_pairs(NAMES) == [("mix", "base"), ("lora", "base"), ("mix", "lora")]
    assert choose_pairs(["a", "b"]) == [("a", "b")]
    assert choose_pairs(["a:1+b:1", "a"], ["a:1+b:1:a"]) == [("a:1+b:1", "a")]
    assert choose_pairs([None]) == []
    assert choose_pairs([None, *"abcde"]) == [(name, "base") for name in "abcde"]


def test_pairs_can_be_asked_for():
    assert choose_pairs(NAMES, ["mix@0:mix@1", "lora:mix"]) == [("mix@0", "mix@1"), ("lora", "mix")]
    # a single seed by the name of its group
    assert choose_pairs(["base", "mix@0", "lora"], ["mix:base"]) == [("mix", "base")]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["base", "mix@0"], "mix:mix@0"),
        (["base", "mix@0"], "mix@0:mix"),
        *((NAMES, text) for text in ("lora", "lora:", "lora:law", "lora:lora", "lora:base:mix")),
    ],
)
def test_a_pair_of_others_is_an_error(names, text):
    with pytest.raises(ConfigError, match="--compare must be FIRST:SECOND, two of base, mix@0, "):
        choose_pairs(names, [text])


def test_seeds_answer_as_the_share_of_them_that_are_right():
    assert seed_values(ANSWERS.right, "mix") == [1.0, 0.5, 0.5, 1.0]
    assert seed_values({"mix@0": (True, False)}, "mix") == [1.0, 0.0]
    assert compare(ANSWERS, "mix", "lora") == compare_paired([1, 0.5, 0.5, 1], [1, 0, 0, 0])
    with pytest.raises(ConfigError, match=r"must be one of base, mix@0, .*, got 'law'"):
        compare(ANSWERS, "law", "lora")


def test_several_comparisons_are_adjusted_for_their_number():
    found = summarise([toy_scores(), toy_scores(task="other", values=WRONG)], [("law", "base")])
    assert [comparison.task for comparison in found.comparisons] == ["toy", "other"]
    for comparison in found.comparisons:
        assert (comparison.first, comparison.second) == ("law", "base")
        assert comparison.adjusted_p_value == min(1, 2 * comparison.p_value)
        assert comparison.difference == 0.0


def test_seeds_have_a_mean_and_a_sample_deviation_in_each_task():
    right = {f"mix@{seed}": (True,) * (2 + seed) + (False,) * (2 - seed) for seed in range(3)}
    (group,) = summarise_seeds([TaskAnswers("toy", (0, 1, 2, 3), right)]).values()
    assert group["adapters"] == ["mix@0", "mix@1", "mix@2"]
    assert group["tasks"] == {"toy": {"mean": 0.75, "sd": pytest.approx(0.25), "num_seeds": 3}}


def test_answers_survive_their_files_and_are_joined_by_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    first = [toy_scores(names=["base", "a"]), toy_scores(task="other")]
    for name, scores in (("a", first), ("b", [toy_scores(names=["base", "b"])])):
        write_lines(tmp_path / f"{name}.jsonl", [line for one in scores for line in one.lines])
    toy, other = read_answers("~/a.jsonl", str(tmp_path / "b.jsonl"))
    assert (toy.task, toy.questions) == ("toy", (0, 1))
    assert toy.right == dict.fromkeys(["base", "a", "b"], (True, False))
    assert (other.task, list(other.right)) == ("other", ["base", "law"])


LINE = {"task": "t", "index": 0, "question": "f", "adapter": "a", "correct": True}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINE | {"correct": None}], "line 1: field 'correct' must be true or false, got None"),
        ([LINE | {"index": "0"}], "line 1: field 'index' must be an integer, got '0'"),
        ([LINE, LINE | {"correct": False}], "t: 'a' must answer a question once, got"),
        ([LINE | {"score": 8}, LINE | {"index": 1}], "t: score all rows or none"),
        (
            [LINE, LINE | {"adapter": "b", "question": "g"}],
            "but a, b lack some; use",
        ),
        ([LINE, LINE | {"adapter": "b", "index": 1}, LINE | {"index": 2}], "but a, b lack"),
    ],
)
def test_lines_that_can_not_be_used_are_an_error(tmp_path, lines, message):
    write_lines(tmp_path / "q.jsonl", lines)
    with pytest.raises(DataError, match=message):
        read_answers(tmp_path / "q.jsonl")


FILTERED = [
    LINE | {"filter": "strict", "correct": False},
    LINE | {"filter": "flexible"},
    LINE | {"task": "choice", "filter": "none"},
]
JUDGED = [
    {"completion": "", "task": 3, "index": "", "prompt": prompt, "adapter": name, "score": score}
    for name, prompt, score in (("a", "x", 1), ("a", "y", 2), ("b", "y", 2), ("b", "x", 1))
]
PAIRS = [
    {"adapter": "a", "index": 0, "dataset": name, "correct": name == "law"}
    for name in ("law", "math")
]


@pytest.mark.parametrize(
    ("lines", "answers"),
    [
        (FILTERED, [("t,strict", (False,)), ("t,flexible", (True,)), ("choice", (True,))]),
        (JUDGED, [("judged", (1, 2))]),
        (PAIRS, [("law", (True,)), ("math", (False,))]),
    ],
    ids=["filters of an answer", "rows that a judge sorts", "data sets of pairs"],
)
def test_lines_make_tasks(tmp_path, lines, answers):
    write_lines(tmp_path / "q.jsonl", lines)
    tasks = read_answers(tmp_path / "q.jsonl")
    assert [(task.task, task.right["a"]) for task in tasks] == answers
    assert all(right == task.right["a"] for task in tasks for right in task.right.values())
