"""Files of rows: JSON, JSON lines, CSV, plain text and Parquet, plain or gzipped.

Rows are read one after the other, but for a JSON list, which is read as a whole. A reader gives
them unparsed, so that it costs little to pass over some.
"""

from __future__ import annotations

import base64
import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from loraloom.config.faults import suggestion
from loraloom.config.json_text import parse_json
from loraloom.config.paths import local_path
from loraloom.data.rows import Row, check_faults
from loraloom.errors import DataError, shown

_PARQUET_ROWS = 1000
"""Rows of a Parquet file that are in memory at once."""

_DAMAGED = (OSError, EOFError, zlib.error)

UnparsedRow = Callable[[], Row]
"""Makes a row of its line."""


def read_file(path: Path) -> list[Row]:
    """Every row of a file, each with the line that it came from."""
    rows = read_all(path)
    check_faults([(row.origin, row.fault) for row in rows if row.fault], len(rows))
    return rows


def read_all(path: Path) -> list[Row]:
    """As `read_file`, but a row that can't be read stands there with its fault."""
    rows = list(rows_of_file(path))
    if not rows:
        raise DataError(f"{path}: the file has no rows; add some, or name another file")
    return rows


def rows_of_file(path: Path, start: int = 0) -> Iterator[Row]:
    """Read a file's rows one after the other; it is looked at when this is called.

    A row that can't be read has its fault; a file that is damaged is an error where that shows.
    """
    path = local_path(path, "a data file", DataError)
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory; {_neighbours(path)}")
    unparsed = _reader(path)(path)
    return (parse() for parse in islice(unparsed, start, None))


def is_data_file(path: Path) -> bool:
    """Whether the name is that of a file that `read_file` can read."""
    return _suffix(path) in _READERS


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _reader(path: Path) -> Callable[[Path], Iterator[UnparsedRow]]:
    try:
        return _READERS[_suffix(path)]
    except KeyError:
        raise DataError(
            f"{path}: a data file must end in one of {', '.join(_READERS)} "
            f"(.gz may follow), got {path.name!r}"
        ) from None


def _neighbours(path: Path) -> str:
    """What there is in the place of a missing file."""
    if not path.parent.is_dir():
        return f"the directory {path.parent} does not exist either"
    names = [
        entry.name for entry in entries_of(path.parent) if entry.is_dir() or is_data_file(entry)
    ]
    shown = ", ".join(names[:10]) or "nothing to read"
    return f"{suggestion(path.name, names)}{path.parent} has {shown}"


def entries_of(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise DataError(f"{directory} can't be listed: {error.strerror}") from error


def _opener(path: Path) -> Any:
    return gzip.open if path.name.lower().endswith(".gz") else open


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file to read; what goes wrong with it while it is open is a DataError."""
    try:
        with _opener(path)(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except _DAMAGED as error:
        raise DataError(
            f"{path}: the file can't be read: {error}; is it whole, and of the kind that its name "
            "says?"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the file must be UTF-8 text: {error}; save it as UTF-8"
        ) from error


def _json_row(line: str, origin: str) -> Row:
    try:
        return _row(parse_json(line, "the row", DataError), origin)
    except DataError as error:
        return Row({}, origin, str(error).replace(", line 1", "", 1))


def _row(value: Any, origin: str) -> Row:
    if isinstance(value, dict):
        return Row(value, origin)
    return Row({}, origin, f"a row must be a JSON object, got {type(value).__name__}")


def _read_json_lines(path: Path) -> Iterator[UnparsedRow]:
    with _open_text(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield partial(_json_row, line.removesuffix("\n"), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[UnparsedRow]:
    with _open_text(path, newline="\n") as file:
        first = next((line for line in file if line.strip()), "")
        if first.strip() == "{":  # no row of JSON lines
            raise DataError(
                f"{path}: a .json file must be a list of rows, or have a row a line, got one "
                "object over several lines; write its list of rows alone"
            )
        is_list = first.lstrip().startswith("[")
        file.seek(0)
        text = file.read() if is_list else ""
    if not is_list:  # JSON lines under the wrong name, as often on the hub
        yield from _read_json_lines(path)
        return
    for number, value in enumerate(parse_json(text, str(path), DataError), start=1):
        yield partial(_row, value, f"{path}, row {number}")


def _read_csv(path: Path) -> Iterator[UnparsedRow]:
    csv.field_size_limit(2**31 - 1)  # Python's own, 128 KB, is for all readers of a process
    with _open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] | None = None
        line = 1
        try:
            for values in reader:
                begins, line = line, reader.line_num + 1
                if columns is None:
                    columns = _check_columns(path, values)
                elif values:
                    yield partial(_csv_row, columns, values, f"{path}, line {begins}")
        except csv.Error as error:
            place = f"{path}, line {reader.line_num}"
            raise DataError(f"{place}: not valid CSV: {error}; mend the quotes") from error


def _csv_row(columns: list[str], values: list[str], origin: str) -> Row:
    if len(values) > len(columns):
        return Row(
            {},
            origin,
            f"a row must have at most {len(columns)} columns as the first line has, got "
            f"{len(values)}; put texts with commas into quotes",
        )
    return Row(dict(zip(columns, values, strict=False)), origin)


def _check_columns(path: Path, columns: list[str]) -> list[str]:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}, line 1: columns must have different names, got {shown(twice[0])} twice; "
            "rename one"
        )
    return columns


def _read_plain_text(path: Path) -> Iterator[UnparsedRow]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield partial(Row, {"text": line.removesuffix("\n")}, f"{path}, line {number}")


def _read_parquet(path: Path) -> Iterator[UnparsedRow]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with _opener(path)(path, "rb") as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    origin = f"{path}, row {number}"
                    yield lambda record=record, origin=origin: Row(as_json(record), origin)
    except (*_DAMAGED, ValueError, ArithmeticError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: not a Parquet file that can be read: {error}; write it again"
        ) from error


def as_json(value: Any) -> Any:
    """A value of a table as JSON has it: dates and decimals as texts, bytes in base64."""
    if isinstance(value, Mapping):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):  # pandas writes NaN for nothing
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return value.isoformat() if isinstance(value, date | time) else str(value)


_READERS: dict[str, Callable[[Path], Iterator[UnparsedRow]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_plain_text,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
