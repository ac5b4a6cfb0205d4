"""Files of rows: JSON, JSON lines, CSV, plain text and Parquet, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loraloom.config.faults import suggestion
from loraloom.data.rows import Row
from loraloom.errors import DataError


def read_file(path: Path) -> list[Row]:
    """Every row of a file, each with the line that it came from.

    Args:
        path: A file whose suffix is one of SUFFIXES.

    Raises:
        DataError: If the file is missing, of an unknown kind, damaged or empty.
    """
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


def _parse_json(text: str, path: Path, line: int = 1) -> Any:
    """The value of a JSON text that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}: not valid JSON: {error.msg}, column "
            f"{error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:  # more digits or levels than Python takes
        raise DataError(f"{path}, line {line}: JSON that can't be read: {error}") from error


def _row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a JSON object, got {type(value).__name__}")
    return Row(value, origin)


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield _row(_parse_json(line, path, number), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    if not text.lstrip().startswith("["):  # JSON lines under the wrong name, as often on the hub
        yield from _read_json_lines(path)
        return
    _parse_json(text, path)  # the list as a whole; what follows only finds the line of each row
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
    reader = csv.reader(_read_text(path).splitlines(keepends=True))
    columns = next(reader, [])
    for values in reader:
        origin = f"{path}, line {reader.line_num}"
        if len(values) > len(columns):
            raise DataError(
                f"{origin}: a row must have at most {len(columns)} columns as the first line has, "
                f"got {len(values)}"
            )
        if values:
            yield Row(dict(zip(columns, values, strict=False)), origin)


def _read_plain_text(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if line.strip():
            yield Row({"text": line}, f"{path}, line {number}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        records = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
    for number, record in enumerate(records, start=1):
        yield Row(record, f"{path}, row {number}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_plain_text,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
