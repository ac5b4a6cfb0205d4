from __future__ import annotations

import json

import pytest

from loraloom.config.data import DataConfig
from loraloom.data.encoding import prompt_form
from loraloom.data.sources import Row
from loraloom.data.templates import instruction_columns, load_template, read_instruction
from loraloom.errors import DataError

ALPACA = Row({"instruction": "Add.", "input": "1 2", "output": "3"}, "f.jsonl, line 1")
DOLLY = Row({"instruction": "Add.", "context": "", "response": "3", "category": "qa"}, "f, line 2")


def read(row, template=None, mapping=None):
    return read_instruction(row, instruction_columns(row, mapping), load_template(template))


def test_alpaca_prompt_with_input():
    assert read(ALPACA) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )


def test_alpaca_prompt_without_input_from_dolly_fields():
    assert read(DOLLY, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    )


def test_plain_prompt():
    assert read(ALPACA, "plain") == ("Add.\n1 2\n", "3")
    assert read(DOLLY, "plain") == ("Add.\n", "3")


def test_a_template_of_ones_own_sees_every_field():
    assert read(DOLLY, "[{{ category }}] {{ instruction }} ->") == ("[qa] Add. ->", "3")


def test_a_template_may_come_from_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("Q: {{ instruction }}\nA:\n")
    assert read(ALPACA, str(tmp_path / "mine.jinja"))[0] == "Q: Add.\nA:\n"


def test_fields_may_have_other_names():
    row = Row({"task": "Add.", "given": None, "result": "3"}, "f, line 1")
    mapping = {"instruction": "task", "input": "given", "output": "result"}
    assert read(row, "plain", mapping) == ("Add.\n", "3")


def test_input_may_be_missing():
    assert read(Row({"instruction": "Add.", "output": "3"}, "f"), "plain") == ("Add.\n", "3")


@pytest.mark.parametrize(
    ("fields", "mapping", "message"),
    [
        ({"instruction": "Add."}, None, "f.jsonl, line 9: the row has no field 'output'"),
        ({"output": "3"}, None, "f.jsonl, line 9: the row has no field 'instruction'"),
        ({"instruction": 1, "output": "3"}, None, "field 'instruction' must be a string, got 1"),
        ({"instruction": "", "output": " \n"}, None, "line 9: field 'output' is empty"),
    ],
)
def test_a_row_without_its_field_is_named(fields, mapping, message):
    with pytest.raises(DataError, match=message):
        read(Row(fields, "f.jsonl, line 9"), None, mapping)


def test_an_unknown_field_in_a_template_is_named():
    with pytest.raises(DataError, match="line 1: the prompt template can't be filled in: 'topic'"):
        read(ALPACA, "{{ topic }}")


def test_templates_can_not_reach_outside():
    with pytest.raises(DataError, match="can't be filled in: access to attribute '__class__'"):
        read(ALPACA, "{{ instruction.__class__.__mro__ }}")


def test_an_unknown_template_offers_the_nearest():
    with pytest.raises(DataError, match=r"did you mean 'alpaca'\? template must be alpaca, plain"):
        load_template("alpacca")


def test_a_broken_template_is_refused():
    with pytest.raises(DataError, match="is not valid Jinja"):
        load_template("{{ instruction ")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SYSTEM = [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize(
    ("settings", "rows", "expected"),
    [
        ({"format": "instruction"}, [], {"format": "instruction", "template": "alpaca"}),
        (
            {"format": "instruction", "template": "Q: {{ instruction }}"},
            [],
            {"format": "instruction", "template": "Q: {{ instruction }}"},
        ),
        ({"format": "text"}, [], {"format": "text"}),
        ({"format": "chat"}, [{"messages": SYSTEM + CHAT}] * 2, {"system": "Be kind."}),
        ({"format": "chat"}, [{"messages": CHAT}, {"messages": SYSTEM + CHAT}], {}),
        (
            {"format": "chat", "chat_template": "{{ messages }}"},
            [{"messages": CHAT}],
            {"chat_template": "{{ messages }}"},
        ),
        (
            {"format": "preference"},
            [{"prompt": "Hi", "chosen": "a", "rejected": "b"}],
            {"format": "preference"},
        ),
        (
            {"format": "preference"},
            [{"prompt": SYSTEM + CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}],
            {"system": "Be kind."},
        ),
    ],
)
def test_the_form_of_prompts_is_that_of_the_data(
    tmp_path, tiny_tokenizer, settings, rows, expected
):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = DataConfig.model_validate({"dataset": str(path), **settings})
    form = prompt_form(data, tiny_tokenizer)
    assert form.model_dump(exclude_none=True) == {"format": "chat", **expected}
    mix = DataConfig.model_validate({"mix": [data.sources[0], {"task": "boolq"}]})
    assert prompt_form(mix, tiny_tokenizer) == form


def test_prompts_of_tasks_are_read_as_they_stand(tiny_tokenizer):
    form = prompt_form(DataConfig.model_validate({"task": "boolq"}), tiny_tokenizer)
    assert form.format == "task"
    assert form.is_text
