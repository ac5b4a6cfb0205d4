"""Calls in what models write, whole and in pieces of any size."""

import pytest

from loraloom.serve.http.tools import CallStream, parse_calls

NAMES = ["paint", "wait"]
CALL = '{"name": "paint", "arguments": {"color": "blé"}}'
WRITTEN = {
    f"<tool_call>\n{CALL}\n</tool_call>": ("", 1),
    f"Gladly. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>": ("Gladly.", 2),
    f"<tool_call>{CALL}": ("", 1),  # the end token came in place of the closing tag
    f"[TOOL_CALLS] [{CALL}, {CALL}]": ("", 2),
    f" [{CALL}]": ("", 1),
    CALL.replace("arguments", "parameters"): ("", 1),
    "<|python_tag|>" + CALL: ("", 1),
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
    "[" * 5000,
    "<tool_",
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


def test_spaces_in_an_open_call_cost_no_more_than_letters():
    text = "<tool_call>x" + 200_000 * " " + "x"  # minutes, if spaces are tried in every way
    assert parse_calls(text, NAMES) == (text, [])


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("text", [*WRITTEN, *TEXTS], ids=lambda text: text[:20])
def test_streams_say_what_whole_answers_do(text, size):
    stream = CallStream(NAMES)
    settled = "".join(stream.push(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = stream.finish()
    whole, expected = parse_calls(text, NAMES)
    assert (settled + rest).strip() == whole.strip()
    assert calls == expected


def test_text_is_told_as_it_comes():
    stream = CallStream(NAMES)
    pieces = ("<think>Hel", "lo <", "b> <tool", "_call>{")
    assert [stream.push(piece) for piece in pieces] == ["<think>Hel", "lo ", "<b> ", ""]
