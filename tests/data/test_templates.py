from __future__ import annotations

import pytest
from jinja2 import TemplateError

from loraloom.data import templates
from loraloom.data.chat_template import load_chat_template
from loraloom.data.messages import Conversation
from loraloom.data.prompts import compile_template, load_template, read_instruction
from loraloom.data.rows import Row
from loraloom.errors import DataError

TOO_LONG = "it makes a text, a list or a number that is too long"
TOO_MUCH = "it makes more than 100000000 characters"
TOO_SLOW = "it takes more than 0.2 seconds"
TOO_WIDE = "a width to format must be a number of up to four digits"
GROWING = "{% set n = namespace(x='xx') %}{% for i in range(99) %}BODY{% endfor %}"

HOSTILE = {
    "{{ 1/0 }}": "division by zero",
    "{{ x.y.z }}": "'x' is undefined",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TOO_SLOW,
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "maximum recursion depth",
    "{% macro a(n) %}{% if n %}{{ a(n-1) ~ a(n-1) }}{% endif %}{% endmacro %}{{ a(99) }}": TOO_SLOW,
    "{{ 'x' * 10**18 }}": TOO_LONG,
    "{{ 'x' * 10**10 }}": TOO_LONG,
    "{{ [1] * 10**10 }}": TOO_LONG,
    "{{ (10**1000) ** 1000 }}": TOO_LONG,
    "{{ 'x'|center(10**10) }}": TOO_LONG,
    "{{ 'x'.ljust(10**10) }}": TOO_LONG,
    "{{ [1, 2]|batch(10**9, 0)|list }}": TOO_LONG,
    "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}": TOO_LONG,
    "{{ '%1000000000d' % 1 }}": TOO_WIDE,
    "{{ '%*d' % (10**9, 1) }}": TOO_WIDE,
    "{{ '%(n)10000d' | format(n=1) }}": TOO_WIDE,
    "{{ '%(a(b))200000d' % {'a(b)': 1} }}": TOO_WIDE,
    "{{ '{a[}]:200000}'.format(a={'}': 1}) }}": TOO_WIDE,
    "{{ '{:1000000000d}'.format(1) }}": TOO_WIDE,
    "{{ '{:{w}d}'.format(1, w=10**9) }}": TOO_WIDE,
    "{{ lipsum(10**9) }}": "'lipsum' is undefined",
    "{{ range(5000)|map('center', 90000)|join }}": TOO_MUCH,
    GROWING.replace("BODY", "{% set n.x = n.x ~ n.x %}"): TOO_MUCH,
    GROWING.replace("BODY", "{% set n.x = n.x + n.x %}"): TOO_MUCH,
    GROWING.replace("BODY", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"): TOO_MUCH,
    GROWING.replace("BODY", "{% set n.x = [n.x, n.x] %}"): TOO_LONG,
    GROWING.replace("BODY", "{% set n.x = (n.x, n.x) %}"): TOO_LONG,
    GROWING.replace("BODY", "{% set n.x = {1: n.x, 2: n.x} %}"): TOO_LONG,
    GROWING.replace("BODY", "{% set n.x = [n.x] * 2 %}"): TOO_LONG,
    GROWING.replace("BODY", "{% set n.x = [n.x] + [n.x] %}"): TOO_LONG,
    GROWING.replace("BODY", "{% set n.x = cycler(n.x, n.x).items %}"): TOO_MUCH,
    GROWING.replace("BODY", "{% set n.x = dict(a=n.x, b=n.x) %}"): TOO_MUCH,
    "{% macro a() %}{{ a(varargs, varargs) }}{% endmacro %}{{ a() }}": TOO_LONG,
    "{% macro a() %}{{ a(b=kwargs, c=kwargs) }}{% endmacro %}{{ a() }}": TOO_LONG,
    "{{ '\\ud800' }}": "it makes no text of Unicode",
    "{{" + "(" * 9999: "maximum recursion depth",
}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ '**%s**' % 'x' }}", "**x**"),
        ("{{ '* %s' | format('x') }}", "* x"),
        ('{{ \'{"a": {"b": "%s"}}\' % \'x\' }}', '{"a": {"b": "x"}}'),
        ("{{ 'PO 12345: %s' % 'x' }}", "PO 12345: x"),
        ("{{ '12345 * {:>3}'.format('x') }}", "12345 *   x"),
    ],
)
def test_formats_without_a_wide_field_are_taken(source, text):
    assert templates.render(compile_template(source, "template"), {}) == text


@pytest.mark.parametrize(("source", "message"), HOSTILE.items())
def test_a_hostile_template_is_one_clear_error(source, message, monkeypatch):
    if message == TOO_SLOW:  # others may take their time on a busy machine
        monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    row = Row({"instruction": "a", "output": "b"}, "a.jsonl, line 7")
    columns = {"instruction": "instruction", "input": "input", "output": "output"}
    with pytest.raises(DataError, match=message):
        read_instruction(row, columns, compile_template(source, "the template"))


@pytest.mark.parametrize(("source", "message"), HOSTILE.items())
def test_a_hostile_chat_template_is_too(source, message, monkeypatch, tiny_tokenizer):
    if "undefined" in message and "lipsum" not in message:
        message = "is undefined"
    if message == TOO_SLOW:  # others may take their time on a busy machine
        monkeypatch.setattr(templates, "MAX_SECONDS", 0.2)
    tiny_tokenizer.chat_template = source
    with pytest.raises((DataError, TemplateError), match=message):
        load_chat_template(tiny_tokenizer).render(Conversation([{"role": "user", "content": "a"}]))


def test_bounds_leave_ordinary_templates_alone():
    source = (
        "{% for x in items %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}"
        "{{ 1.5 % 2 }} {{ 7 % 2 }} {{ 2 ** 3 }} {{ 'ab' ~ 1 ~ none }} {{ [3, 1]|sort }}"
        " {{ 'ab'[1:] }}{% for k, v in {'a': 1}.items() %} {{ '%s=%5.1f' % (k, v) }}{% endfor %}"
        " {{ '{:>4}'.format(1700000000) }} {{ items|join(', ')|upper }} {{ 'a'.replace('a', 'b') }}"
    )
    template = compile_template(source, "the template")
    assert templates.render(template, {"items": ["p", "q"]}) == (
        "1/2False 2/2True 1.5 1 8 ab1None [1, 3] b a=  1.0 1700000000 P, Q b"
    )


def test_lists_in_lists_are_compared_written_and_taken_apart():
    source = (
        "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(9) %}"
        "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}"
        "{% set a, (b, c) = 1, (2, {'k': [3]}) %} {{ a }}{{ b }}{{ c.k in [[3]] }}"
        " {{ (c,)|string }}"
        "{% macro m() %}{{ varargs|length }}{{ kwargs.k }}{% endmacro %} {{ m(1, 2, k='v') }}"
    )
    template = compile_template(source, "the template")
    assert templates.render(template, {}) == "True 12True ({'k': [3]},) 2v"


@pytest.mark.parametrize("template", ["x" * 5000, "~nosuchuser/t", "a\0b", "nowhere.jinja"])
def test_what_is_neither_a_template_nor_a_file_is_told_shortly(template):
    with pytest.raises(DataError, match="template must be alpaca, plain, a Jinja") as raised:
        load_template(template)
    assert len(str(raised.value)) < 400
