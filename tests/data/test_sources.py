import datetime
import gzip
import json
import math
import re
from decimal import Decimal
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from loraloom.data.sources import HubSource, Row, RowStream, find_location, find_named, read_rows
from loraloom.errors import DataError

ROWS = [{"text": "one", "n": 1}, {"text": "zwei é", "n": 2}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ROW = Row({"question": "Why?", "label": "2", "choices": {"text": ["a", "b"]}}, "some.jsonl, line 7")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "origin"),
    [
        ("a.jsonl", LINES, "line 2"),
        ("a.json", LINES, "line 2"),
        ("a.json", json.dumps(ROWS, indent=2), "row 2"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_json_is_read_as_lines_or_as_a_list(tmp_path, name, text, origin, ending):
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending else text.encode())
    rows = read_rows(path)
    assert rows == ROWS
    assert rows[1].origin == f"{path}, {origin}"


def test_parquet_may_be_gzipped(tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    rows = read_rows(packed)
    assert rows == read_rows(tmp_path / "a.parquet") == ROWS
    assert rows[1].origin == f"{packed}, row 2"
    packed.write_bytes(packed.read_bytes()[:50])
    with pytest.raises(DataError, match=r"b\.parquet\.gz: the file can't be read"):
        read_rows(packed)


def test_csv_values_are_texts_with_their_line_over_quoted_line_breaks(tmp_path):
    long = "x" * 200_000
    rows = read_rows(write(tmp_path / "a.csv", f'text,n\n"one\nline",007\n\nNA,\n{long}\n'))
    assert rows == [{"text": "one\nline", "n": "007"}, {"text": "NA", "n": ""}, {"text": long}]
    assert [row.origin[-6:] for row in rows] == ["line 2", "line 5", "line 6"]
    with pytest.raises(DataError, match=r"a.csv, line 6: the row has no field 'n'"):
        rows[2]["n"]
    rows = read_rows(write(tmp_path / "a.csv", ",text\n0,one\n"))  # as pandas' index
    assert rows == [{"": "0", "text": "one"}]


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\v", "\f", "\x1c"])
def test_only_line_breaks_end_a_row(tmp_path, separator):
    text = f"one{separator}two"
    assert read_rows(write(tmp_path / "a.csv", f"text,n\n{text},1\n")) == [{"text": text, "n": "1"}]
    rows = read_rows(write(tmp_path / "a.txt", f"{text}\r\n\nnext"))
    assert rows == [{"text": text}, {"text": "next"}]
    line = json.dumps({"text": "a\u2028b"}, ensure_ascii=False)
    assert read_rows(write(tmp_path / "a.jsonl", line)) == [{"text": "a\u2028b"}]


def test_keys_that_other_rows_have_are_not_read_as_nulls_of_a_table(tmp_path):
    rows = [{"call": {"city": "Orlen"}, "note": None}, {"call": {"a": 1}, "note": "x"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


def test_what_json_has_no_form_for_becomes_text_when_parquet_is_read(tmp_path):
    moment = datetime.datetime(2026, 1, 2, 3, 4)
    values = [
        moment.date(),
        moment,
        Decimal("1.50"),
        b"\xc3\xa9\xff",
        math.nan,
        [{"at": moment.time()}],
    ]
    table = pa.table({f"f{place}": [value] for place, value in enumerate(values)})
    parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    days = ["2026-01-02", "2026-01-02 03:04:00"]
    assert list(row.values()) == [*days, "1.50", "é\\xff", None, [{"at": "03:04:00"}]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2: the row must be JSON: EOF"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl, line 2: a row must be a JSON object, got list"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', "a.json: the list must be JSON: expected `:` at"),
        ("a.json", '["{}"]', "a.json, row 1: a row must be a JSON object, got str"),
        ("a.json", "[" * 100_000, "a.json: the list must be JSON: recursion limit"),
        ("a.jsonl", '{}\n{"text": "\\ud800"}', "a.jsonl, line 2: the row must be JSON: "),
        ("a.jsonl", "\n", "a.jsonl contains no rows"),
        ("a.json", '{\n "data": [{}]\n}', "a.json: a .json file must contain a list of rows"),
        ("a.csv", "text,label\n", "a.csv contains no rows"),
        ("a.csv", 'text\n"never closed\n', "a.csv: line 2: not valid CSV: unexpected end of data"),
        ("a.csv", "text\none,two\n", "a.csv, line 2: a row must have at most 1 columns"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv: columns must have different names"),
        ("a.csv", "a;b\n1;2\n", "a.csv: columns must be separated by commas, got the header 'a;b'"),
        ("a.parquet", "not parquet", "a.parquet: the file can't be read"),
        ("a.jsonl.gz", "not gzip", "a.jsonl.gz: the file can't be read"),
        ("a.xlsx", "x", "a.xlsx: a data file must end in one of .jsonl, .json, .csv"),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, name, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_rows(write(tmp_path / name, text))


def test_a_file_that_is_not_utf8_or_not_there_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(DataError, match=r"a.jsonl: the file can't be read: 'utf-8' codec can't"):
        read_rows(tmp_path / "a.jsonl")
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no such file or directory; did you mean 'train.jsonl'\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="nowhere has nothing"):
        read_rows(tmp_path / "nowhere" / "train.jsonl")


def test_a_missing_field_is_named_with_file_and_line():
    message = "some.jsonl, line 7: the row has no field 'answer'; its fields are 'question', 'lab"
    with pytest.raises(DataError, match=re.escape(message)):
        ROW["answer"]
    assert ROW.get("answer") is None
    row = Row({f"f{n}\x1b[31m": n for n in range(30)}, "f, line 1")
    with pytest.raises(DataError, match=r"fields are 'f0\\x1b\[31m', 'f1.* and 10 more$"):
        row["label"]


@pytest.fixture
def collection(tmp_path):
    """A directory of two data sets."""
    for name in ("quiz", "riddles"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text(f'{{"text": "{name} {split}"}}\n')
    return tmp_path


def texts(rows):
    return [row["text"] for row in rows]


def test_a_data_set_is_found_in_a_directory_of_data_sets_in_its_own_or_in_a_file(collection):
    write(collection / "mine.jsonl", '{"text": "mine"}')
    for place, found in (("", "quiz test"), ("riddles", "riddles test"), ("mine.jsonl", "mine")):
        assert texts(read_rows(find_named(collection / place, "quiz", "test"))) == [found]


def test_an_absent_data_set_or_split_offers_the_nearest_name(collection):
    with pytest.raises(DataError, match="split must be train as the file's name says, got 'test'"):
        find_named(collection / "quiz" / "train.jsonl", "quiz", "test")
    message = r"quiz has no split 'validation'; the splits are: test, train"
    with pytest.raises(DataError, match=message):
        find_named(collection, "quiz", "validation")
    with pytest.raises(DataError, match=message):
        find_location(str(collection / "quiz"), "validation")


def test_a_dataset_may_be_a_directory_or_a_file_and_a_missing_one_is_not_on_the_hub(collection):
    assert texts(read_rows(find_location(str(collection / "quiz"), "train"))) == ["quiz train"]
    file = str(collection / "quiz" / "test.jsonl")
    assert texts(read_rows(find_location(file, "train"))) == ["quiz test"]
    for name in (str(collection / "nothing"), "alpaca.jsonl"):
        with pytest.raises(DataError, match="no such file or directory"):
            read_rows(find_location(name, "train"))


def test_a_hub_data_set_is_read_at_its_revision_or_a_data_error(monkeypatch):
    asked = []

    def load_dataset(repository, config, *, revision, split):
        asked.append((repository, config, revision, split))
        return datasets.Dataset.from_list([{"text": "from the hub", "call": {"a": None}}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(HubSource("owner/quiz", "easy", "abc"), "train")
    assert texts(rows) == ["from the hub"]
    assert rows[0]["call"] == {}
    assert rows[0].origin == "owner/quiz, train, row 1"
    assert find_location("owner/quiz", "test", "easy") == HubSource("owner/quiz", "easy")
    assert asked == [("owner/quiz", "easy", "abc", "train")]
    fail = Mock(side_effect=ConnectionError("Couldn't reach the Hub\nlong trace"))
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/quiz: .*Couldn't reach the Hub; without"):
        RowStream(HubSource("owner/quiz"), "train")
