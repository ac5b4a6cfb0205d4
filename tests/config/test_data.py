import pytest
from pydantic import ValidationError

from loraloom.config.data import DataConfig, SourceConfig

CHAT = {"dataset": "owner/set", "format": "chat"}
TEXT = {"dataset": "a.jsonl", "format": "text"}


def test_a_mix_is_its_sources():
    first = {"task": "arc_easy", "weight": 2}
    second = {"dataset": "alpaca.jsonl", "format": "instruction"}
    data = DataConfig.model_validate({"mix": [first, second]})
    assert [source.weight for source in data.sources] == [2, 1]
    assert [source.dataset for source in data.sources] == [None, "alpaca.jsonl"]


def test_a_task_is_scored_by_label_by_default():
    assert SourceConfig(task="arc_easy").scoring == "label"
    assert SourceConfig(**TEXT).scoring is None


CONTRADICTIONS = [
    ({}, "data must set task, dataset or mix"),
    ({"task": "arc_easi"}, "task must be one of arc_easy, "),
    ({**TEXT, "task": "piqa"}, "dataset and task exclude each other"),
    ({"task": "piqa", "format": "chat"}, "format is not supported for a task"),
    ({"dataset": "a.jsonl"}, "dataset requires format"),
    ({**CHAT, "path": "data"}, "path is not supported for a dataset"),
    ({**CHAT, "template": "alpaca"}, "template is not supported for format chat"),
    ({**TEXT, "chat_template": "hermes"}, "chat_template is not supported for format text"),
    ({**CHAT, "fields": {"turns": "t"}}, "fields must map messages, prompt, completion, "),
    (
        {**CHAT, "fields": {"messages": "t", "completion": "c"}},
        "fields must map messages, or prompt and completion, got both",
    ),
    ({"task": "piqa", "mix": [{"task": "boolq"}]}, "mix and task, scoring exclude each other"),
    ({"mix": []}, "at least 1 item"),
    ({"mix": [{"weight": 2}]}, "a source must be a task or a dataset, got neither"),
    ({"mix": [{"task": "piqa", "weight": 0}]}, "greater than 0"),
    ({"task": "piqa", "weight": 2}, "unknown key 'weight'"),
    ({**TEXT, "split": "x"}, "split is not supported for a file"),
    ({"task": "piqa", "validation_fraction": 1}, "less than 1"),
    ({**TEXT, "validation_fraction": 0.1, "validation": TEXT}, "validation and validation_fracti"),
    ({**CHAT, "shuffle_buffer": 9}, "shuffle_buffer requires streaming"),
    ({**CHAT, "validation": {**CHAT, "weight": 2}}, "validation does not support weight"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_a_setting_without_effect_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(settings)
