from __future__ import annotations

import pytest

from loraloom.config.task import load_task_config
from loraloom.errors import ConfigError

MINIMAL = """
data: {files: {test: test.jsonl}}
template: "{{ question }}"
choices: options
answer: answer
"""


def load(tmp_path, text):
    path = tmp_path / "quiz.yaml"
    path.write_text(text)
    return load_task_config(path)


def test_a_task_needs_little(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert (config.scoring, config.answer_is, config.delimiter) == ("text", "label", " ")
    assert config.template == {"text": "{{ question }}"}


def test_one_template_is_for_the_default_scoring(tmp_path):
    assert list(load(tmp_path, "scoring: label" + MINIMAL).template) == ["label"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("naem: quiz", "unknown key 'naem'"),
        ("scoring: both", "scoring must be 'label' or 'text', got 'both'"),
        ("labels: [A]", "labels must be a field's name or a list of two or more texts"),
        ("answer_is: number", "answer_is must be 'label', 'index' or 'text', got 'number'"),
        ("normalization: bytes", "normalization must be 'characters' or 'none', got 'bytes'"),
        ("evaluation_split: ''", "evaluation_split"),
    ],
)
def test_a_fault_is_named(tmp_path, more, message):
    with pytest.raises(ConfigError, match=r"quiz.yaml has a fault:") as error:
        load(tmp_path, MINIMAL + more)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("choices: options", "choices: [1, 2]", r"choices must be .*\(numbers in quotes"),
        ("choices: options", 'choices: ["no", "yes"]\nlabels: [A, B, C]', "labels must be as many"),
        ("choices: options", "choices: 3", "choices must be a field's name or a list"),
        ("choices: options", "", "choices must be given, it is missing"),
        ('"{{ question }}"', "{both: x}", "template must be a text, or map label or text to one"),
        ('"{{ question }}"', "{label: x}", "text for one, got label"),
        ("files: {test: test.jsonl}", "{}", "hub or files must be given, one of them"),
        ("{test: test.jsonl}}", "{test: t.jsonl}, hub: a/b}", "hub or files must be given, one"),
        ("{test: test.jsonl}}", "{test: t.jsonl}, config: a}", "config has no effect without hub"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, other, message):
    text = MINIMAL.replace(line, other).replace("{{}}", "{}")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        load_task_config(tmp_path / "nowhere.yaml")


def test_what_is_no_mapping_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="must be a mapping of settings, got list"):
        load(tmp_path, "[1]")
