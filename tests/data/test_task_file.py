import json
from dataclasses import replace
from pathlib import Path

import pytest

from loraloom.data.sources import sha256
from loraloom.data.tasks import find_task, load_question_set, questions_digest
from loraloom.errors import ConfigError, DataError

RECIPE = Path(__file__).parents[2] / "recipes" / "tasks" / "custom_arc_easy.yaml"

TASK = """
data: {files: {train: rows/train.jsonl, test: rows/test.jsonl}}
template: "Q: {{ question }}\\nA:"
choices: options
answer: answer
answer_is: index
"""
OF_TEMPLATES = """
data: {files: {test: rows/test.jsonl}}
template: "{{ question }}"
choices: ["{{ options[0] }}", "{{ options[1]|upper }}"]
labels: ["1", "2"]
answer: "{{ answer + 1 }}"
delimiter: "\\n"
normalization: none
group: topic
"""
ROW = {"question": "How many?", "options": ["one", "three"], "answer": 1, "topic": "sums"}


@pytest.fixture
def write(tmp_path):
    """Write quiz.yaml and its rows; give the file's path."""

    def write(text=TASK, *rows):
        (tmp_path / "rows").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows or (ROW,))
        for split in ("train", "test"):
            (tmp_path / "rows" / f"{split}.jsonl").write_text(lines)
        (tmp_path / "quiz.yaml").write_text(text)
        return str(tmp_path / "quiz.yaml")

    return write


@pytest.mark.parametrize(
    ("changes", "answer", "options", "gold"),
    [
        ("answer_is: text", "one", ["one", " one"], None),
        ("answer_is: text", "one", ["three", "one ", "three"], 1),
        ("answer_is: index", 1, ["one", "one"], 1),
        ('answer_is: label\nlabels: ["1", " 1"]', "1", ["one", "two"], None),
    ],
    ids=["the right one twice", "a wrong one twice", "by index", "labels but for a space"],
)
def test_an_answer_that_two_choices_have_is_rejected(write, changes, answer, options, gold):
    path = write(
        TASK.replace("answer_is: index", changes), ROW | {"options": options, "answer": answer}
    )
    if gold is None:
        with pytest.raises(DataError, match=r"must be a single choice's .*, got 2 such choices"):
            load_question_set(path)
    else:
        assert load_question_set(path).questions[0].gold == gold


def test_a_row_becomes_a_question(write, tmp_path):
    path = write()
    found = load_question_set(path)
    assert (found.task, found.split, found.scoring) == ("quiz", "test", "text")
    (asked,) = found.questions
    assert asked.task == "quiz"
    assert asked.contexts == ("Q: How many?\nA:",) * 2
    assert asked.continuations == (" one", " three")
    assert asked.normalizers == (3.0, 5.0)
    assert (asked.labels, asked.gold, asked.group) == (("A", "B"), 1, None)
    assert found.source == {
        "file": str(tmp_path / "rows" / "test.jsonl"),
        "sha256": sha256(tmp_path / "rows" / "test.jsonl"),
        "task_file": path,
        "task_file_sha256": sha256(Path(path)),
    }
    assert load_question_set("skills", limit=1).source == {"generated": "by loraloom"}
    assert questions_digest([asked]) == questions_digest(load_question_set(path).questions)
    assert questions_digest([asked]) != questions_digest([replace(asked, gold=0)])


@pytest.mark.parametrize("scoring", ["label", "text"])
def test_the_recipe_asks_what_the_built_in_task_asks(shared_dir, scoring):
    data = shared_dir / "data" / "arc_easy"
    own = load_question_set(str(RECIPE), scoring, "validation", data).questions
    built_in = load_question_set("arc_easy", scoring, "validation", data).questions
    assert [replace(question, task="arc_easy") for question in own] == built_in
    assert find_task(str(RECIPE)).source == find_task("arc_easy").source


@pytest.mark.parametrize(
    ("answer_is", "answer", "gold"),
    [("label", " B ", 1), ("index", 0, 0), ("index", "1", 1), ("text", "three", 1)],
)
def test_an_answer_is_a_label_an_index_or_a_text(write, answer_is, answer, gold):
    text = TASK.replace("answer_is: index", f"answer_is: {answer_is}")
    assert load_question_set(write(text, {**ROW, "answer": answer})).questions[0].gold == gold


def test_choices_labels_and_answer_may_be_templates(write):
    (asked,) = load_question_set(write(OF_TEMPLATES)).questions
    assert asked.continuations == ("\none", "\nTHREE")
    assert asked.normalizers == (1.0, 1.0)
    assert (asked.labels, asked.gold, asked.group) == (("1", "2"), 1, "sums")
    (asked,) = load_question_set(write(OF_TEMPLATES, {**ROW, "topic": ""})).questions
    assert asked.group is None  # results call those of all questions ""


def test_fields_may_be_inside_others_and_inside_lists(write):
    text = TASK.replace("choices: options", "choices: q.options.text\nlabels: q.options.label")
    text = text.replace("answer_is: index", "answer_is: label").replace("question }}", "q.stem }}")
    options = [{"label": "x", "text": 1}, {"label": "y", "text": 2.5}]
    row = {"q": {"stem": "?", "options": options}, "answer": "y"}
    (asked,) = load_question_set(write(text, row)).questions
    assert asked.contexts[0] == "Q: ?\nA:"
    assert (asked.continuations, asked.labels, asked.gold) == ((" 1", " 2.5"), ("x", "y"), 1)


def test_a_template_sees_the_choices_and_scoring_by_label_offers_the_labels(write):
    text = TASK.replace("{{ question }}", "{{ choice_texts|join(',') }} {{ choice_labels[1] }}")
    (asked,) = load_question_set(write(f"scoring: label{text}")).questions
    assert asked.contexts[0] == "Q: one,three B\nA:"
    assert (asked.continuations, asked.normalizers) == ((" A", " B"), (1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": None}, "field 'options' must be a list, got None"),
        ({"options": ["one"]}, "a question must have at least 2 choices, .* got 1 and A"),
        ({"options": ["one", ["x"]]}, r"field 'options' must be a text or a number, got \['x'\]"),
        ({"answer": 2}, r"answer \(answer\) must be a choice's index, one of 0, 1, got '2'"),
        ({"answer": None}, "answer must be a text or a number, got None"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(write, change, message):
    with pytest.raises(DataError, match=rf"test.jsonl, line 2: {message}"):
        load_question_set(write(TASK, ROW, {**ROW, **change}))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("options", "the row has no field 'options'; the fields there are 'question', "),
        ("question", "template can't be filled in: 'question' is undefined; the row's fields"),
    ],
)
def test_a_missing_field_is_named_with_those_that_are_there(write, field, message):
    row = {name: value for name, value in ROW.items() if name != field}
    with pytest.raises(DataError, match=f"line 1: {message}"):
        load_question_set(write(TASK, row))


def test_labels_must_fit_the_choices(write):
    text = TASK.replace("choices: options", "choices: options\nlabels: tags")
    for tags in (["x"], ["x"] * 2):
        with pytest.raises(DataError, match=r"with different labels .* got 2 and x"):
            load_question_set(write(text, {**ROW, "tags": tags}))


def test_what_a_task_lacks_is_an_error(write, tmp_path):
    path = write()
    with pytest.raises(ConfigError, match=r"quiz.yaml: template has no entry for scoring label"):
        load_question_set(path, "label")
    with pytest.raises(DataError, match=r"has no split 'tset'; did you mean 'test'\?"):
        load_question_set(path, split="tset")
    (tmp_path / "rows" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test.jsonl: no such file"):
        load_question_set(path)
    with pytest.raises(ConfigError, match=r"quiz.yaml: label: answer_is must be 'label', 'index'"):
        load_question_set(write(f"{TASK}label: {{answer_is: labl}}"))
    with pytest.raises(DataError, match=r"quiz.yaml: template is not valid Jinja"):
        load_question_set(write(TASK.replace("{{ question }}", "{{ question")))
    with pytest.raises(DataError, match="quiz contains no data; set path"):
        load_question_set(write(TASK.replace("data:", "#")))
    assert len(load_question_set(path, path=tmp_path / "rows").questions) == 1
    (tmp_path / "my quiz.yaml").write_text(TASK)
    with pytest.raises(ConfigError, match=r"my quiz.yaml: name must be a safe file name"):
        load_question_set(str(tmp_path / "my quiz.yaml"))
