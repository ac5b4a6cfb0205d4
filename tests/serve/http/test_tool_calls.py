"""Calls in what models write."""

import json

import pytest

from loraloom.serve.http.completions import chat_prompt
from loraloom.serve.http.schemas import ChatBody
from loraloom.serve.http.tools import find_settled, parse_calls

NAMES = {
    "paint": {
        "properties": {
            "color": {"type": "string"},
            "layers": {"type": "integer"},
            "is_wet": {"type": "boolean"},
            "size": {"type": "object"},
            "share": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "note": {"type": ["string", "null"]},
        }
    },
    "wait": None,
}
CALL = '{"name": "paint", "arguments": {"color": "blé"}}'
XML = """<tool_call>
<function=paint>
<parameter=color>
blé
</parameter>
</function>
</tool_call>"""
WRITTEN = {
    f"<tool_call>\n{CALL}\n</tool_call>": ("", 1),
    f"Gladly. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>": ("Gladly.", 2),
    f"<tool_call>{CALL}": ("", 1),  # the end token came in place of the closing tag
    f"[TOOL_CALLS] [{CALL}, {CALL}]": ("", 2),
    f" [{CALL}]": ("", 1),
    CALL.replace("arguments", "parameters"): ("", 1),
    "<|python_tag|>" + CALL: ("", 1),
    '[TOOL_CALLS]paint[ARGS]{"color": "blé"}': ("", 1),
    'Gladly.[TOOL_CALLS]paint[CALL_ID]abcdef123[ARGS]{"color": "blé"}': ("Gladly.", 1),
    'Now:\n[TOOL_CALLS]paint{"color": "blé"}[TOOL_CALLS]paint[ARGS]{"color": "blé"}': ("Now:", 2),
    'paint{"color": "blé"}': ("", 1),  # the text of a tokenizer whose markers are special
    f"{XML}\n{XML}": ("", 2),
    f"Gladly.\n\n{XML}": ("Gladly.", 1),
}
TEXTS = [
    "",
    " ",
    "The sky is blue < green.",
    "[1] is a footnote",
    '{"color": "blue"}',
    CALL.replace("paint", "nobody"),
    f"<tool_call>{CALL[:-1]}</tool_call>",
    f"<tool_call>{CALL}</tool_call><tool_call>nothing</tool_call>",
    '{"name": "paint", "arguments": 3}',
    '{"name": ["paint"], "arguments": {}}',
    "[" * 5000,
    "<tool_",
    "[TOOL_CALLS]paint[ARGS]{",
    '[TOOL_CALLS]nobody[ARGS]{"color": "blue"}',
    "[NOTE] The sky is [BLUE",
    XML.replace("=paint", "=nobody"),
    XML.replace("</parameter>", ""),
    'paint{"color": "blue"} is how to call it',
]


@pytest.mark.parametrize("text", WRITTEN)
def test_calls_are_found_in_the_notations_of_families(text):
    content, number = WRITTEN[text]
    said, calls = parse_calls(text, NAMES)
    assert said == content
    assert [call.name for call in calls] == ["paint"] * number
    assert {call.arguments for call in calls} == {'{"color": "bl\\u00e9"}'}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_what_is_no_call_stays_text(text):
    assert parse_calls(text, NAMES) == (text, [])


def streamed(text, tools):
    """The parts of an answer that are sent before its end, when each character is a chunk."""
    parts = []
    start = 0
    for end in range(1, len(text) + 1):
        settled = find_settled(text[:end], start, tools)
        parts.append(text[start:settled])
        start = settled
    return [part for part in parts if part]


@pytest.mark.parametrize("text", WRITTEN)
def test_no_part_of_a_call_is_streamed(text):
    content, _ = WRITTEN[text]
    assert content.startswith("".join(streamed(text, NAMES)).lstrip())


def test_text_next_to_tools_is_streamed_as_it_comes():
    text = "The sky is blue < green, [1] says. <tool is no call."
    parts = streamed(text, NAMES)
    assert "".join(parts) == text
    assert len(parts) > 30
    assert "".join(streamed("Gladly. <tool_call>{", NAMES)) == "Gladly."


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>x" + 200_000 * " " + "x",  # minutes, if spaces are tried in every way
        "<tool_call><function=paint>" + 100_000 * "<parameter=color>",  # and ends of each
        "<tool_call><function=paint>" + 100_000 * "<parameter=",
    ],
    ids=["spaces", "parameters", "openings"],
)
def test_open_calls_are_read_in_linear_time(text):
    assert parse_calls(text, NAMES) == (text, [])


@pytest.mark.parametrize("schema", [3, {"properties": 3}, {"properties": {"color": {"anyOf": 3}}}])
def test_schemas_of_parameters_that_are_none_leave_texts(schema):
    _, calls = parse_calls(XML, {"paint": schema})
    assert json.loads(calls[0].arguments) == {"color": "blé"}


def test_parameters_in_tags_have_the_types_of_the_schema():
    values = {
        "color": "3",
        "layers": "3",
        "is_wet": "True",
        "size": '{"x": [1, null]}',
        "share": "null",
        "note": "null",
        "other": "a\n<b>\n\n",
    }
    tags = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in values.items())
    _, calls = parse_calls(f"<tool_call>\n<function=paint>\n{tags}</function>\n</tool_call>", NAMES)
    assert json.loads(calls[0].arguments) == {
        "color": "3",
        "layers": 3,
        "is_wet": True,
        "size": {"x": [1, None]},
        "share": None,
        "note": "null",
        "other": "a\n<b>\n\n",
    }
    wrong = "<tool_call><function=paint><parameter=layers>many</parameter></function></tool_call>"
    assert json.loads(parse_calls(wrong, NAMES)[1][0].arguments) == {"layers": "many"}


def test_tools_that_may_not_be_called_are_left_out_of_the_prompt():
    tools = [{"type": "function", "function": {"name": "paint"}}]
    body = {"model": "lora", "messages": [{"role": "user", "content": "one"}], "tools": tools}
    assert chat_prompt(ChatBody.model_validate(body)).tools == tools
    assert chat_prompt(ChatBody.model_validate(body | {"tool_choice": "none"})).tools is None
