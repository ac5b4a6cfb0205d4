from __future__ import annotations

import datetime
import gzip
import json
import math
import random
import re
from decimal import Decimal
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pytest
from pyarrow import parquet

from loraloom.data.files import read_file
from loraloom.errors import DataError

ROWS = [{"text": "one", "n": 1}, {"text": "zwei é", "n": 2}]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_json_lines_are_read_in_order(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    assert read_file(write(tmp_path / "a.jsonl", text)) == ROWS


def test_gzipped_json_lines_are_read(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))
    assert read_file(path) == ROWS


def test_a_json_list_is_read_with_the_number_of_each_row(tmp_path):
    rows = read_file(write(tmp_path / "a.json", json.dumps(ROWS, indent=2)))
    assert rows == ROWS
    assert rows[1].origin.endswith("a.json, row 2")


def test_json_lines_named_json_are_read(tmp_path):
    text = "\n".join(json.dumps(row) for row in ROWS)
    assert read_file(write(tmp_path / "a.json", text)) == ROWS


def test_parquet_may_be_gzipped(tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert read_file(packed) == read_file(tmp_path / "a.parquet")
    packed.write_bytes(packed.read_bytes()[:50])
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        read_file(packed)


def test_a_date_that_python_lacks_is_an_error(tmp_path):
    far = pa.array([10**17], pa.timestamp("ms"))
    parquet.write_table(pa.table({"text": ["x"], "when": far}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="not a Parquet file that can be read"):
        read_file(tmp_path / "a.parquet")


def test_csv_rows_know_their_line_over_quoted_line_breaks(tmp_path):
    rows = read_file(write(tmp_path / "a.csv", 'text,n\n"one\nline",1\ntwo,2\n'))
    assert rows == [{"text": "one\nline", "n": "1"}, {"text": "two", "n": "2"}]
    assert [row.origin[-6:] for row in rows] == ["line 2", "line 4"]


def test_a_short_csv_row_lacks_the_field(tmp_path):
    row = read_file(write(tmp_path / "a.csv", "text,label\nonly text\n"))[0]
    with pytest.raises(DataError, match=r"a.csv, line 2: the row has no field 'label'"):
        row["label"]


def test_a_long_csv_row_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a.csv, line 2: a row must have at most 1 columns"):
        read_file(write(tmp_path / "a.csv", "text\none,two\n"))


def test_parquet_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path)
    rows = read_file(path)
    assert rows == ROWS
    assert rows[1].origin.endswith("a.parquet, row 2")


def test_plain_text_gives_a_row_a_line(tmp_path):
    rows = read_file(write(tmp_path / "a.txt", "one\n\ntwo\n"))
    assert [row["text"] for row in rows] == ["one", "two"]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\v", "\f", "\x1c"])
def test_only_line_breaks_end_a_row(tmp_path, separator):
    text = f"one{separator}two"
    assert read_file(write(tmp_path / "a.csv", f"text,n\n{text},1\n")) == [{"text": text, "n": "1"}]
    assert read_file(write(tmp_path / "a.txt", f"{text}\r\nnext")) == [
        {"text": text},
        {"text": "next"},
    ]


def test_a_csv_field_may_be_long(tmp_path):
    (row,) = read_file(write(tmp_path / "a.csv", "text\n" + "x" * 200_000))
    assert len(row["text"]) == 200_000


def test_what_json_has_no_form_for_becomes_text_when_parquet_is_read(tmp_path):
    table = {
        "day": [datetime.date(2026, 1, 2)],
        "at": [datetime.datetime(2026, 1, 2, 3, 4)],
        "price": [Decimal("1.50")],
        "image": [b"\xff"],
        "score": [math.nan],
        "turns": [[{"at": datetime.time(3, 4)}]],
    }
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    (row,) = read_file(tmp_path / "a.parquet")
    assert json.loads(json.dumps(row, allow_nan=False)) == {
        "day": "2026-01-02",
        "at": "2026-01-02T03:04:00",
        "price": "1.50",
        "image": "/w==",
        "score": None,
        "turns": [{"at": "03:04:00"}],
    }


@pytest.mark.parametrize("name", ["a" * 300 + ".jsonl", "a\0.jsonl", "~nosuchuser/a.jsonl"])
def test_what_can_be_no_path_is_one_clear_error(name):
    with pytest.raises(DataError, match="a data file must be a path"):
        read_file(Path(name))


def test_unicode_line_separators_do_not_end_a_json_line(tmp_path):
    text = json.dumps({"text": "a\u2028b"}, ensure_ascii=False)
    assert read_file(write(tmp_path / "a.jsonl", text)) == [{"text": "a\u2028b"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: the row must be JSON, column 6: EOF"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2: a row must be a JSON object, got list"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json must be JSON, line 2, column 7: expected `:`"),
        ("a.json", '[{"a": 1},\n', "a.json must be JSON, line 2, column 0: EOF while"),
        ("a.json", '[\n{"a": 1} {"b": 2}]', "a.json must be JSON, line 2, column 10: expected `,`"),
        ("a.json", '[{"a": 1}]\njunk', "a.json must be JSON, line 2, column 1: trailing char"),
        ("a.json", '[{"a": 1}]\n[{"b": 2}]', "a.json must be JSON, line 2, column 1: trailing"),
        ("a.json", '[{"a": 1},]', "a.json must be JSON, line 1, column 11: trailing comma"),
        ("a.json", '[\n[{"a": 1}]]', "a.json, row 1: a row must be a JSON object, got list"),
        ("a.json", "[" * 100_000, "a.json must be JSON, line 1, column 202: more than 200 levels"),
        (
            "a.jsonl",
            '{"a": ' + "[" * 100_000,
            "line 1: the row must be JSON, column 207: more than",
        ),
        ("a.jsonl", "{}\n" + "1" * 5000, "line 2: the row must be JSON, column 4302: number out"),
        (
            "a.jsonl",
            '{}\n{"text": "\\ud800"}',
            "a.jsonl, line 2: the row must be JSON, column 17: unexpected",
        ),
        (
            "a.jsonl",
            '{"label": Infinity}',
            "a.jsonl, line 1: the row must be JSON, column 11: expected value",
        ),
        ("a.jsonl", '{"label": 1e400}', "a.jsonl, line 1: the row, label must be a number that"),
        ("a.jsonl", "\n", "a.jsonl: the file has no rows"),
        ("a.json", "[]", "a.json: the file has no rows"),
        ("a.json", '{\n "data": [{}]\n}', "a.json: a .json file must be a list of rows, or have"),
        ("a.csv", "text,label\n", "a.csv: the file has no rows"),
        ("a.csv", 'text\n"never closed\n', "a.csv, line 2: not valid CSV: unexpected end of data"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv, line 1: columns must have different names, got 'a' t"),
        ("a.parquet", "not parquet", "a.parquet: not a Parquet file that can be read"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz: the file can't be read"),
        ("a.xlsx", "x", "a.xlsx: a data file must end in one of .jsonl, .json, .csv"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_file(write(tmp_path / name, text))


def test_a_directory_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(DataError, match=f"{tmp_path} can't be listed: Permission denied"):
        read_file(tmp_path / "absent.jsonl")


ARRAY = json.dumps([{"text": "a, ]\n", "n": [1, {"m": None}]}, {}, {"text": "é"}], indent=1)


@pytest.mark.parametrize("length", range(1, len(ARRAY)))
def test_a_list_that_is_cut_short_is_refused_with_its_line(tmp_path, length):
    path = write(tmp_path / "a.json", ARRAY[:length])
    with pytest.raises(DataError, match=r"a\.json must be JSON, line \d+, column \d+: "):
        read_file(path)


def test_a_list_with_a_character_changed_reads_as_json_does_or_not_at_all(tmp_path):
    generator = random.Random(0)
    for _ in range(300):
        place = generator.randrange(1, len(ARRAY))
        text = ARRAY[:place] + generator.choice('[]{}",: 1x\n') + ARRAY[place + 1 :]
        path = write(tmp_path / "a.json", text)
        try:
            expected = json.loads(text)
        except ValueError:
            with pytest.raises(DataError, match=r"a\.json must be JSON, line \d+, column \d+: "):
                read_file(path)
            continue
        assert all(isinstance(row, dict) for row in expected), "changed into another kind of list"
        assert read_file(path) == expected


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match=r"a.jsonl: the file must be UTF-8 text"):
        read_file(tmp_path / "a.jsonl")


def test_a_missing_file_offers_the_nearest_name(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file or directory; did you mean 'train.jsonl'\?"):
        read_file(tmp_path / "trian.jsonl")


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist either"):
        read_file(tmp_path / "nowhere" / "train.jsonl")
