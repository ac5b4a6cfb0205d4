from __future__ import annotations

import re

import pytest

from loraloom.data.rows import Row
from loraloom.errors import DataError

ROW = Row({"question": "Why?", "label": "2", "choices": {"text": ["a", "b"]}}, "some.jsonl, line 7")


def test_a_missing_field_is_named_with_file_and_line():
    message = (
        "some.jsonl, line 7: the row has no field 'answer'; its fields are 'question', 'label'"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        ROW["answer"]
    with pytest.raises(DataError, match=r"no field 'answer'; its fields are 'answer '$"):
        Row({"answer ": "2"}, "some.csv, line 2")["answer"]


def test_get_and_in_do_not_raise():
    assert ROW.get("answer") is None
    assert "answer" not in ROW


def test_a_field_of_another_type_is_refused():
    with pytest.raises(DataError, match=r"line 7: field 'choices' must be a string, got {'text'"):
        ROW.text("choices")
    with pytest.raises(DataError, match="line 7: field 'question' must be an integer, got 'Why"):
        ROW.integer("question")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1.5, "1.5", None, [1]])
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(DataError, match="line 7: field 'label' must be an integer, got"):
        Row({"label": value}, "f.jsonl, line 7").integer("label")


def test_a_message_names_twenty_fields_and_is_plain_text():
    row = Row({f"f{n}\x1b[31m": n for n in range(30)}, "f, line 1")
    with pytest.raises(DataError, match=r"fields are 'f0\\x1b\[31m', 'f1.* and 10 more$"):
        row["label"]


def test_digits_are_an_integer():
    assert ROW.integer("label") == 2


def test_long_values_are_shortened_in_messages():
    with pytest.raises(DataError) as caught:
        Row({"text": ["x" * 1000]}, "f").text("text")
    assert len(str(caught.value)) < 150
