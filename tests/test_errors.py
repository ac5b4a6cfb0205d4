import pytest

from loraloom.errors import MAX_MESSAGE, FormatError, plain, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("math", "'math'"),
        ("\x1b[31mred\x07", r"'\x1b[31mred\x07'"),
        ("right\u202eleft", r"'right\u202eleft'"),
        ("\ud800", r"'\ud800'"),
        ([1, "\x1b"], r"[1, '\x1b']"),
    ],
)
def test_a_foreign_value_is_shown_without_what_a_terminal_obeys(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["x" * 10**6] * 100, {str(n): n for n in range(999)}]
)
def test_a_foreign_value_is_shown_short(value):
    assert len(shown(value)) < 700


def test_plain_text_keeps_its_lines_and_other_scripts():
    assert plain("eine Zeile: größer\n模型") == "eine Zeile: größer\n模型"
    assert plain("a\tb\x1b]0;title\x07") == r"a\tb\x1b]0;title\x07"


def test_a_message_is_plain_and_short_whatever_it_is_made_of():
    assert str(FormatError("adapter \x1b[2J: \ud800")) == r"adapter \x1b[2J: \ud800"


@pytest.mark.parametrize("character", ["x", "\x1b", "\ud800", "\U000e0001"])
def test_a_message_is_cut_when_it_is_escaped(character):
    assert str(FormatError("x" * MAX_MESSAGE)) == "x" * MAX_MESSAGE
    message = str(FormatError(character * 10**6))
    assert message.startswith(plain(character * 300))
    assert message.endswith(" …")
    assert len(message) == MAX_MESSAGE
