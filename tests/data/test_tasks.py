"""The questions of each task: the strings written out are the paper's and lm-eval's own."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from loraloom.config.data import TaskName
from loraloom.data.sources import HubSource, Row
from loraloom.data.tasks import ChoiceQuestion, find_task, load_question_set
from loraloom.errors import ConfigError, DataError

TASK_NAMES = get_args(TaskName)
TASKS = yaml.safe_load(Path(__file__).with_name("questions.yaml").read_text())
TASKS["arc_challenge"] = TASKS["arc_easy"]


def question(task, scoring, **changes) -> ChoiceQuestion:
    row = Row({**TASKS[task]["row"], **changes}, "rows.jsonl, line 5")
    return find_task(task).question(row, 7, scoring)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_label_prompts_are_the_papers(task):
    asked, expected = question(task, "label"), TASKS[task]["label"]
    assert set(asked.contexts) == {expected["prompt"]}
    assert asked.continuations == tuple(f" {label}" for label in expected["answers"])
    assert (list(asked.labels), asked.gold) == (expected["answers"], expected["gold"])
    assert set(asked.normalizers) == {1.0}
    assert (asked.task, asked.index) == (task, 7)


@pytest.mark.parametrize("task", [task for task in TASKS if "text" in TASKS[task]])
def test_text_prompts_are_those_of_lm_eval(task):
    asked, expected = question(task, "text"), TASKS[task]["text"]
    assert set(asked.contexts) == {expected["prompt"]}
    assert list(asked.continuations) == expected["answers"]
    assert asked.gold == expected["gold"]
    assert list(asked.normalizers) == expected["normalizers"]


def test_winogrande_compares_the_rest_of_the_sentence_after_each_option():
    asked = question("winogrande", "text")
    assert asked.contexts == ("Ann thanked Bo as Ann", "Ann thanked Bo as Bo")
    assert asked.continuations == (" had helped.", " had helped.")
    assert asked.normalizers == (1.0, 1.0)
    assert asked.gold == 1


@pytest.mark.parametrize("scoring", ["label", "text"])
@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_right_answer_is_learnt_over_wrong_ones_in_turn(task, scoring):
    asked, row = question(task, scoring), Row(TASKS[task]["row"], "rows.jsonl, line 5")
    choices = list(zip(asked.contexts, asked.continuations, strict=True))
    right = choices.pop(asked.gold)
    for index in range(4):
        pair = find_task(task).training_texts(row, index, scoring)
        assert pair == (right, choices[index % len(choices)])


@pytest.mark.parametrize(("answer", "gold"), [(1, 1), (0, 0), ("True", 1), ("false", 0)])
def test_boolq_reads_superglues_labels_and_csv_words(answer, gold):
    row = {key: value for key, value in TASKS["boolq"]["row"].items() if key != "answer"}
    assert find_task("boolq").question(Row({**row, "label": answer}, "f"), 0, "text").gold == gold


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("piqa", {"label": -1}),
        ("boolq", {"answer": -1}),
        ("social_i_qa", {"label": "0"}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("skills", {"answer": 2}),
        ("arc_easy", {"answerKey": "B"}),
        ("winogrande", {"sentence": "no blank"}),
        ("arc_easy", {"choices": {"text": ["one"], "label": ["1", "2"]}}),
        ("arc_easy", {"choices": ["one", "two"]}),
    ],
)
def test_a_row_without_a_usable_answer_is_named(task, changes):
    with pytest.raises(DataError, match=r"^rows.jsonl, line 5"):
        question(task, "text", **changes)


def test_built_in_tasks_have_their_names_default_splits_and_pinned_sources():
    tasks = {name: find_task(name) for name in TASK_NAMES}
    assert [task.name for task in tasks.values()] == list(TASK_NAMES)
    splits = {name: task.config.evaluation_split for name, task in tasks.items()}
    with_test = {name for name, split in splits.items() if split == "test"}
    assert with_test == {"arc_easy", "arc_challenge", "openbookqa"}
    assert {*splits.values()} == {"test", "validation"}
    sources = [task.source for name, task in tasks.items() if name != "skills"]
    assert all(isinstance(source, HubSource) and len(source.revision) == 40 for source in sources)


@pytest.mark.parametrize(
    ("task", "split", "count"),
    [
        ("arc_easy", None, 2376),
        ("arc_challenge", None, 1172),
        ("openbookqa", None, 500),
        ("boolq", None, 3270),
        ("piqa", None, 1838),
        ("arc_easy", "validation", 570),
    ],
)
def test_real_data_has_its_published_number_of_questions(shared_dir, task, split, count):
    asked = load_question_set(task, "text", split=split, path=shared_dir / "data").questions
    assert [question.index for question in asked] == list(range(count))
    assert all(0 <= question.gold < len(question.labels) for question in asked)


def test_arc_keeps_numbered_labels(shared_dir):
    asked = load_question_set("arc_easy", "label", path=shared_dir / "data" / "arc_easy").questions
    numbered = [question for question in asked if question.labels[0] == "1"]
    assert numbered
    assert all("(1) " in question.contexts[0] for question in numbered)
    limited = load_question_set("arc_easy", "label", path=shared_dir / "data", limit=3).questions
    assert limited == asked[:3]


def test_an_unknown_task_or_a_split_without_answers_is_refused(shared_dir):
    with pytest.raises(ConfigError, match=r"task must be one of arc_easy, .* did you mean 'piqa'"):
        load_question_set("piqua", "text")
    with pytest.raises(DataError, match=r"test.jsonl, line 1: answer \(label\) .* published"):
        load_question_set("piqa", "text", split="test", path=shared_dir / "data")
