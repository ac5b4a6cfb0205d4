import pytest
from jinja2 import TemplateError

from loraloom.config.data import DataConfig, SourceConfig
from loraloom.data.encoding import prompt_form
from loraloom.data.sources import Row
from loraloom.data.templates import (
    ChatTemplate,
    Conversation,
    load_template,
    read_instruction,
)
from loraloom.errors import DataError
from tests.generation.saved import write_rows

ALPACA = Row({"instruction": "Add.", "input": "1 2", "output": "3"}, "f.jsonl, line 1")
QUESTION = Row({"instruction": "Add.", "input": "", "output": "3", "category": "qa"}, "f, line 2")
OTHER = Row({"task": "Add.", "given": None, "result": "3"}, "f, line 1")
HOSTILE = {
    "{{ 1/0 }}": "division by zero",
    "{{ x.y.z }}": "'x' is undefined",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "maximum recursion depth",
    "{{ ''.__class__.mro }}": "access to attribute '__class__'",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{" + "(" * 9999: "maximum recursion depth",
}


def read(row, template=None, mapping=None):
    source = SourceConfig(dataset="rows.jsonl", format="instruction", fields=mapping)
    return read_instruction(row, source.columns, load_template(template))


def test_alpacas_prompt_is_that_of_its_code():
    assert read(ALPACA) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "3",
    )
    assert read(QUESTION, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    )


@pytest.mark.parametrize(
    ("row", "template", "mapping", "prompt"),
    [
        (ALPACA, "plain", None, "Add.\n1 2\n"),
        (QUESTION, "plain", None, "Add.\n"),
        (QUESTION, "[{{ category }}] {{ instruction }} ->", None, "[qa] Add. ->"),
        (OTHER, "plain", {"instruction": "task", "input": "given", "output": "result"}, "Add.\n"),
        (Row({"instruction": "Add.", "output": "3"}, "f"), "plain", None, "Add.\n"),
        (Row({"input": "Add.", "output": "3"}, "f"), "plain", {"instruction": "input"}, "Add.\n"),
        (
            Row({"q": "Add.", "input": "3"}, "f"),
            "plain",
            {"instruction": "q", "output": "input"},
            "Add.\n",
        ),
        (QUESTION, r"{{ 'a [b] c' | regex_replace('\\[.*?\\]', '-') }}", None, "a - c"),
    ],
)
def test_a_template_sees_every_field_whatever_their_names(row, template, mapping, prompt):
    assert read(row, template, mapping) == (prompt, "3")


def test_a_template_may_come_from_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("Q: {{ instruction }}\nA:\n")
    assert read(ALPACA, str(tmp_path / "mine.jinja"))[0] == "Q: Add.\nA:\n"


@pytest.mark.parametrize(("source", "message"), HOSTILE.items())
def test_a_hostile_template_is_one_clear_error(source, message, tiny_tokenizer):
    with pytest.raises(DataError, match=message):
        read(ALPACA, source)
    tiny_tokenizer.chat_template = source
    with pytest.raises((DataError, TemplateError), match=message.replace("'x' ", "")):
        ChatTemplate(tiny_tokenizer).render(Conversation([{"role": "user", "content": "a"}]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("alpacca", r"did you mean 'alpaca'\? template must be alpaca, plain"),
        ("{{ instruction ", "is not valid Jinja"),
        ("/dev/null", "template must be alpaca, .* /dev/null is empty"),
        ("x" * 5000, "template must be alpaca, plain, a Jinja"),
    ],
)
def test_what_is_neither_a_template_nor_a_file_is_a_short_error(template, message):
    with pytest.raises(DataError, match=message) as raised:
        load_template(template)
    assert len(str(raised.value)) < 400


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
SYSTEM = [{"role": "system", "content": "Be kind."}]


TEXTS = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
MESSAGES = {"prompt": SYSTEM + CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}


@pytest.mark.parametrize(
    ("settings", "rows", "more"),
    [
        ({"format": "instruction"}, [], {"template": "alpaca"}),
        ({"format": "instruction", "template": "Q: {{ input }}"}, [], {}),
        ({"format": "text"}, [], {}),
        ({"format": "chat"}, [{"messages": SYSTEM + CHAT}] * 2, {"system": "Be kind."}),
        ({"format": "chat"}, [{"messages": CHAT}, {"messages": SYSTEM + CHAT}], {}),
        ({"format": "chat"}, [{"messages": SYSTEM + CHAT}] * 101 + [{"messages": CHAT}], {}),
        ({"format": "chat", "chat_template": "{{ messages }}"}, [{"messages": CHAT}], {}),
        ({"format": "preference"}, [TEXTS], {}),
        ({"format": "preference", "template": "plain"}, [TEXTS], {"format": "instruction"}),
        ({"format": "preference"}, [{"chosen": None}, {"chosen": CHAT}], {"format": "chat"}),
        ({"format": "preference"}, [MESSAGES], {"format": "chat", "system": "Be kind."}),
    ],
)
def test_the_form_of_prompts_is_that_of_the_data(tmp_path, tiny_tokenizer, settings, rows, more):
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    data = DataConfig.model_validate({"dataset": path, **settings})
    form = prompt_form(data, tiny_tokenizer)
    assert form.model_dump(exclude_none=True) == settings | more
    mix = DataConfig.model_validate({"mix": [data.sources[0], {"task": "boolq"}]})
    assert prompt_form(mix, tiny_tokenizer) == form


def test_variables_that_all_rows_share_are_set_in_the_form_of_prompts(tmp_path, tiny_tokenizer):
    source = "\n{{ tone }} {% if not loud %}{{ messages[0].content }}{% endif %}"
    tiny_tokenizer.chat_template = source
    tone = 'a "b" %} {{ c'
    row = {"messages": CHAT, "chat_template_kwargs": {"tone": tone, "loud": False}}
    path = write_rows(tmp_path / "rows.jsonl", row, row)
    data = DataConfig.model_validate({"dataset": path, "format": "chat"})
    form = prompt_form(data, tiny_tokenizer)
    conversation = Conversation(CHAT)
    written = ChatTemplate(tiny_tokenizer, form.chat_template).render(conversation)
    assert written == f"\n{tone} {CHAT[0]['content']}"
    expected = conversation._replace(variables=row["chat_template_kwargs"])
    assert written == ChatTemplate(tiny_tokenizer).render(expected)
    write_rows(tmp_path / "rows.jsonl", row, {"messages": CHAT})
    assert prompt_form(data, tiny_tokenizer).chat_template is None


def test_prompts_of_tasks_are_read_as_they_are(tiny_tokenizer):
    form = prompt_form(DataConfig.model_validate({"task": "boolq"}), tiny_tokenizer)
    assert (form.format, form.is_text) == ("task", True)
