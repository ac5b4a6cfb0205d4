from __future__ import annotations

import pytest
from jinja2 import TemplateError

from loraloom.data import templates
from loraloom.data.chat import load_chat_template
from loraloom.data.messages import Conversation
from loraloom.data.sources import Row
from loraloom.data.templates import compile_template, load_template, read_instruction
from loraloom.errors import DataError

HOSTILE = {
    "{{ 1/0 }}": "division by zero",
    "{{ x.y.z }}": "'x' is undefined",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "maximum recursion depth",
    "{{ ''.__class__.mro }}": "access to attribute '__class__'",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{" + "(" * 9999: "maximum recursion depth",
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.items())
def test_a_hostile_template_is_one_clear_error(source, message):
    row = Row({"instruction": "a", "output": "b"}, "a.jsonl, line 7")
    columns = {"instruction": "instruction", "input": "input", "output": "output"}
    with pytest.raises(DataError, match=message):
        read_instruction(row, columns, compile_template(source, "the template"))


@pytest.mark.parametrize(("source", "message"), HOSTILE.items())
def test_a_hostile_chat_template_is_too(source, message, tiny_tokenizer):
    tiny_tokenizer.chat_template = source
    with pytest.raises((DataError, TemplateError), match=message.replace("'x' ", "")):
        load_chat_template(tiny_tokenizer).render(Conversation([{"role": "user", "content": "a"}]))


def test_a_text_is_changed_by_a_pattern():
    template = compile_template(r"{{ 'a [b] c' | regex_replace('\\[.*?\\]', '-') }}", "template")
    assert templates.render(template, {}) == "a - c"


@pytest.mark.parametrize("template", ["x" * 5000, "~nosuchuser/t", "a\0b", "nowhere.jinja"])
def test_what_is_neither_a_template_nor_a_file_is_told_shortly(template):
    with pytest.raises(DataError, match="template must be alpaca, plain, a Jinja") as raised:
        load_template(template)
    assert len(str(raised.value)) < 400
