"""The questions of each task: the strings written out are the paper's and lm-eval's own."""

from __future__ import annotations

import pytest

from loraloom.data.sources import HubSource, Row
from loraloom.data.tasks import TASK_NAMES, ChoiceQuestion, find_task, load_question_set
from loraloom.errors import ConfigError, DataError

ROWS = {
    "arc_easy": {
        "question": "What do plants need?",
        "choices": {"text": ["light", "a stone", "salt"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "boolq": {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
    "openbookqa": {
        "question_stem": "The sun is",
        "choices": {"text": ["a star", "a moon"], "label": ["A", "B"]},
        "answerKey": "A ",
    },
    "piqa": {"goal": "Boil an egg.", "sol1": "Use water.", "sol2": "Use sand.", "label": 1},
    "social_i_qa": {
        "context": "Kai lost a key.",
        "question": "What will Kai do?",
        "answerA": "sleep",
        "answerB": "look for it",
        "answerC": "sing",
        "label": "2",
    },
    "hellaswag": {
        "activity_label": "Removing ice",
        "ctx": "[header] Then, the man writes. someone",
        "ctx_a": "[header] Then, the man writes.",
        "ctx_b": "someone",
        "endings": ["drives  off.", "wins [substeps] it.", "a [title] b", "sits."],
        "label": "3",
    },
    "winogrande": {
        "sentence": "Ann thanked Bo as _ had helped.",
        "option1": "Ann",
        "option2": "Bo",
        "answer": "2",
    },
    "skills": {
        "skill": "parity",
        "question": "Bus 12 goes to the",
        "choices": ["lake", "mill"],
        "answer": 1,
    },
}
ROWS["arc_challenge"] = ROWS["arc_easy"]

LABEL = {
    "arc_easy": (
        "Please choose the correct answer to the question: What do plants need? (1) light "
        "(2) a stone (3) salt\nAnswer:",
        ("1", "2", "3"),
        1,
    ),
    "boolq": (
        "Please answer the following question with true or false: is ice cold?\nAnswer:",
        ("true", "false"),
        0,
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: The sun is (A) a star (B) a moon\n"
        "Answer:",
        ("A", "B"),
        0,
    ),
    "piqa": (
        "Below is a common task along with two possible solutions labeled (A) and (B). Please "
        "select the appropriate solution to achieve the task:\nBoil an egg.\n\n(A) Use water.\n"
        "(B) Use sand.\n\nCorrect solution:",
        ("A", "B"),
        1,
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question.\nQuestion: Kai lost a key. What will "
        "Kai do?\n(A) sleep\n(B) look for it\n(C) sing\nAnswer:",
        ("A", "B", "C"),
        1,
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence.\nSentence: Removing ice. "
        "[header] Then, the man writes. someone\n(A) drives  off.\n(B) wins [substeps] it.\n"
        "(C) a [title] b\n(D) sits.\nAnswer:",
        ("A", "B", "C", "D"),
        3,
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        "Sentence: Ann thanked Bo as _ had helped.\n(A) Ann\n(B) Bo\nAnswer:",
        ("A", "B"),
        1,
    ),
    "skills": ("Bus 12 goes to the\n(A) lake\n(B) mill\nAnswer:", ("A", "B"), 1),
}
LABEL["arc_challenge"] = LABEL["arc_easy"]

TEXT = {
    "arc_easy": ("Question: What do plants need?\nAnswer:", (" light", " a stone", " salt"), 1),
    "boolq": ("Ice is frozen water.\nQuestion: is ice cold?\nAnswer:", (" no", " yes"), 1),
    "openbookqa": ("The sun is", (" a star", " a moon"), 0),
    "piqa": ("Question: Boil an egg.\nAnswer:", (" Use water.", " Use sand."), 1),
    "social_i_qa": (
        "Q: Kai lost a key. What will Kai do?\nA:",
        (" sleep", " look for it", " sing"),
        1,
    ),
    "hellaswag": (
        "Removing ice:  Then, the man writes. Someone".replace("  ", " "),
        (" drives off.", " wins it.", " a. b", " sits."),
        3,
    ),
    "skills": ("Bus 12 goes to the", (" lake", " mill"), 1),
}
TEXT["arc_challenge"] = TEXT["arc_easy"]

NORMALIZERS = {
    "arc_easy": (5.0, 7.0, 4.0),
    "arc_challenge": (5.0, 7.0, 4.0),
    "boolq": (1.0, 1.0),
    "openbookqa": (6.0, 6.0),
    "piqa": (10.0, 9.0),
    "social_i_qa": (1.0, 1.0, 1.0),
    "hellaswag": (11.0, 8.0, 4.0, 5.0),
    "skills": (4.0, 4.0),
}


def question(task, scoring, **changes) -> ChoiceQuestion:
    row = Row({**ROWS[task], **changes}, "rows.jsonl, line 5")
    return find_task(task).question(row, 7, scoring)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_label_prompts_are_the_papers(task):
    asked = question(task, "label")
    prompt, labels, gold = LABEL[task]
    assert asked.contexts == (prompt,) * len(labels)
    assert asked.continuations == tuple(f" {label}" for label in labels)
    assert (asked.labels, asked.gold) == (labels, gold)
    assert set(asked.normalizers) == {1.0}
    assert (asked.task, asked.index) == (task, 7)


@pytest.mark.parametrize("task", TEXT)
def test_text_prompts_are_those_of_lm_eval(task):
    asked = question(task, "text")
    prompt, continuations, gold = TEXT[task]
    assert asked.contexts == (prompt,) * len(continuations)
    assert asked.continuations == continuations
    assert asked.gold == gold
    assert asked.normalizers == NORMALIZERS[task]


def test_winogrande_compares_the_rest_of_the_sentence_after_each_option():
    asked = question("winogrande", "text")
    assert asked.contexts == ("Ann thanked Bo as Ann", "Ann thanked Bo as Bo")
    assert asked.continuations == (" had helped.", " had helped.")
    assert asked.normalizers == (1.0, 1.0)
    assert asked.gold == 1


def test_skills_carry_their_skill_as_the_group():
    assert question("skills", "text").group == "parity"
    assert question("skills", "label").group == "parity"
    assert question("piqa", "text").group is None


@pytest.mark.parametrize("scoring", ["label", "text"])
@pytest.mark.parametrize("task", TASK_NAMES)
def test_training_text_is_the_right_answers_question(task, scoring):
    asked = question(task, scoring)
    row = Row(ROWS[task], "rows.jsonl, line 5")
    expected = (asked.contexts[asked.gold], asked.continuations[asked.gold])
    assert find_task(task).training_text(row, scoring) == expected


@pytest.mark.parametrize(("answer", "gold"), [(1, 1), (0, 0), ("True", 1), ("false", 0)])
def test_boolq_reads_superglues_labels_and_csv_words(answer, gold):
    row = {key: value for key, value in ROWS["boolq"].items() if key != "answer"}
    asked = find_task("boolq").question(Row({**row, "label": answer}, "f"), 0, "text")
    assert asked.gold == gold


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


@pytest.mark.parametrize("task", TASK_NAMES)
def test_a_row_without_its_field_is_named(task):
    with pytest.raises(DataError, match=r"^rows.jsonl, line 5: (the row has no|.*defined)"):
        find_task(task).question(Row({"id": "x"}, "rows.jsonl, line 5"), 0, "label")


def test_built_in_tasks_have_their_names_default_splits_and_pinned_sources():
    tasks = {name: find_task(name) for name in TASK_NAMES}
    assert [task.name for task in tasks.values()] == list(TASK_NAMES)
    splits = {name: task.config.evaluation_split for name, task in tasks.items()}
    with_test = {name for name, split in splits.items() if split == "test"}
    assert with_test == {"arc_easy", "arc_challenge", "openbookqa"}
    assert {*splits.values()} == {"test", "validation"}
    sources = [task.source for name, task in tasks.items() if name != "skills"]
    assert all(isinstance(source, HubSource) and len(source.revision) == 40 for source in sources)


def test_an_unknown_task_lists_the_tasks_and_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'piqa'\? task must be one of arc_easy, "):
        load_question_set("piqua", "text")


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
    for scoring in ("label", "text"):
        asked = load_question_set(task, scoring, split=split, path=shared_dir / "data").questions
        assert [question.index for question in asked] == list(range(count))
        assert all(0 <= question.gold < len(question.labels) for question in asked)


def test_arc_keeps_numbered_labels(shared_dir):
    asked = load_question_set("arc_easy", "label", path=shared_dir / "data" / "arc_easy").questions
    numbered = [question for question in asked if question.labels[0] == "1"]
    assert numbered
    assert all("(1) " in question.contexts[0] for question in numbered)
    limited = load_question_set("arc_easy", "label", path=shared_dir / "data", limit=3).questions
    assert limited == asked[:3]


def test_piqas_unlabelled_test_split_is_refused(shared_dir):
    with pytest.raises(
        DataError, match=r"test.jsonl, line 1: answer \(label\) .* published answers"
    ):
        load_question_set("piqa", "text", split="test", path=shared_dir / "data")
