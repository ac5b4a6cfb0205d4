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
    ("line", "other", "message"),
    [
        ("choices: options", "choices: options\nnaem: quiz", "unknown key 'naem'"),
        ("choices: options", "choices: options\nscoring: both", "scoring must be 'label' or"),
        ("choices: options", "choices: [one]", "(?s:.*)at least 2 items"),
        ("choices: options", "", "choices is required, but missing"),
        ('"{{ question }}"', "{both: x}", "template.both.* must be 'label' or 'text'"),
        ('"{{ question }}"', "{label: x}", "template must have a text for scoring text"),
        ("files: {test: test.jsonl}", "hub: null", ".*either hub or files"),
        ("{test: test.jsonl}}", "{test: t.jsonl}, hub: a/b}", ".*either hub or files"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, other, message):
    with pytest.raises(ConfigError, match=rf"quiz.yaml:\n  {message}"):
        load(tmp_path, MINIMAL.replace(line, other))


def test_choices_may_be_numbers(tmp_path):
    assert load(tmp_path, MINIMAL.replace("options", "[1, 2]")).choices == ("1", "2")
