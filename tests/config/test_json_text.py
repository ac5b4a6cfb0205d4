from __future__ import annotations

import json
import os

import pytest

from loraloom.config.json_text import parse_json, read_json
from loraloom.errors import DataError, FormatError


@pytest.mark.parametrize(
    "value",
    [{}, [1, -2.5, None, True], {"a": {"b": ["ä", "\U0001f600"]}}, 10**300, "1" * 400, "e400"],
)
def test_what_json_writes_is_read_back(value):
    assert parse_json(json.dumps(value), "f.json") == value
    assert parse_json(json.dumps(value, ensure_ascii=False, indent=2), "f.json") == value


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "line 1, column 0: EOF while parsing a value"),
        ('{"a": 1,\n oops}', "line 2, column 2: key must be a string"),
        ("{} x", "line 1, column 4: trailing characters"),
        ("[" * 100_000, "line 1, column 202: more than 200 levels"),
        ('{"a":' * 100_000, "more than 200 levels"),
        ("[NaN]", "line 1, column 2: expected value"),
        ("[1, Infinity]", "line 1, column 5: expected value"),
        ("1" * 5000, "number out of range"),
        (r'"\ud800"', "unexpected end of hex escape"),
        ('"\ud800"', "line 1: half a surrogate pair"),
        ('"\x1b"', "control character"),
    ],
)
def test_what_is_no_json_is_an_error_with_its_line(text, fault):
    with pytest.raises(FormatError, match=r"f\.json must be JSON, line") as caught:
        parse_json(text, "f.json", FormatError)
    assert fault in str(caught.value)


@pytest.mark.parametrize("number", ["1e400", "-1e999", "1" * 400, "-" + "9" * 309])
def test_a_number_that_is_infinite_as_a_float_is_an_error_with_its_place(number):
    with pytest.raises(DataError, match=r"f\.json, line 1, a, 1 must be a number that is finite"):
        parse_json(f'{{"a": [0, {number}]}}', "f.json", DataError)


def test_lines_are_those_of_the_file():
    with pytest.raises(DataError, match=r"must be JSON, line 8, column 1: "):
        parse_json("{\n]", "m.jsonl", DataError, line=7)
    text = r'{"1e999": "\" 1e999", "no": null,' + '\n"loss":\n[1e308, -1E+999]}'
    with pytest.raises(DataError, match=r"m\.jsonl, line 9, loss, 1 must be a number that is fin"):
        parse_json(text, "m.jsonl", DataError, line=7)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "f.json").write_text("[1]", encoding="utf-8-sig")
    assert read_json(tmp_path / "f.json") == [1]


def test_a_file_that_can_not_be_read_is_one_clear_error(tmp_path):
    file = tmp_path / "f.json"
    with pytest.raises(DataError, match=r"can't be read: No such file"):
        read_json(file, DataError)
    file.write_bytes(b'"\xff"')
    with pytest.raises(DataError, match="must be text in UTF-8, byte 1 is not"):
        read_json(file, DataError)
    with pytest.raises(DataError, match="must have at most 2 bytes"):
        read_json(file, DataError, max_bytes=2)
    with pytest.raises(DataError, match="must be a file, it is something else"):
        read_json(tmp_path, DataError)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="must be a file, it is something else"):
        read_json(tmp_path / "pipe", DataError)
