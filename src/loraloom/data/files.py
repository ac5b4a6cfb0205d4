"""Files of rows: JSON, JSON lines, CSV, plain text and Parquet, plain or gzipped."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time
from pathlib import Path
from typing import Any

from loraloom.config.faults import suggestion
from loraloom.config.json_text import parse_json
from loraloom.config.paths import local_path
from loraloom.data.rows import Row
from loraloom.errors import DataError, shown


def read_file(path: Path) -> list[Row]:
    """Every row of a file, each with the line that it came from.

    Args:
        path: A file whose suffix is one of SUFFIXES.

    Raises:
        DataError: If the file is missing, of an unknown kind, damaged or empty.
    """
    path = local_path(path, "a data file", DataError)
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory; {_neighbours(path)}")
    rows = list(_reader(path)(path))
    if not rows:
        raise DataError(f"{path}: the file has no rows")
    return rows


def is_data_file(path: Path) -> bool:
    """Whether the name is that of a file that `read_file` can read."""
    return _suffix(path) in _READERS


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return name[name.rfind(".") :] if "." in name else ""


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
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
    names = sorted(
        entry.name for entry in path.parent.iterdir() if entry.is_dir() or is_data_file(entry)
    )
    shown = ", ".join(names[:10]) or "nothing to read"
    return f"{suggestion(path.name, names)}{path.parent} has {shown}"


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the file can't be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file must be UTF-8 text: {error}") from error


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a JSON object, got {type(value).__name__}")
    return Row(value, origin)


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            value = parse_json(line, str(path), DataError, number)
            yield _row(value, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):  # JSON lines under the wrong name, as often on the hub
        yield from _read_json_lines(path)
        return
    # the list as a whole is checked first; what follows only finds the line of each row
    parse_json(text, str(path), DataError)
    decoder = json.JSONDecoder()
    line, seen, position = 1, 0, _skip(text, text.index("[") + 1, " \n\r\t")
    while text[position] != "]":
        line, seen = line + text.count("\n", seen, position), position
        value, position = decoder.raw_decode(text, position)
        yield _row(value, f"{path}, line {line}")
        position = _skip(text, position, ", \n\r\t")


def _skip(text: str, position: int, characters: str) -> int:
    while text[position] in characters:
        position += 1
    return position


def _read_csv(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    with _fields_of_any_length():
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            columns = _check_columns(path, next(reader, []))
            rows = [(reader.line_num, values) for values in reader if values]
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from error
    for number, values in rows:
        if len(values) > len(columns):
            raise DataError(
                f"{path}, line {number}: a row must have at most {len(columns)} columns as the "
                f"first line has, got {len(values)}"
            )
        yield Row(dict(zip(columns, values, strict=False)), f"{path}, line {number}")


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the limit that Python has on CSV, for all that runs."""
    former = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(former)


def _check_columns(path: Path, columns: list[str]) -> list[str]:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}, line 1: columns must have different names, got {shown(twice[0])} twice"
        )
    return columns


def _read_plain_text(path: Path) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(_read_text(path), newline=None), start=1):
        if line.strip():
            yield Row({"text": line.removesuffix("\n")}, f"{path}, line {number}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
    for number, record in enumerate(records, start=1):
        yield Row(as_json(record), f"{path}, row {number}")


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


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_plain_text,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
