"""Rows of data sets: a file, a directory with a file for each split, or the Hugging Face hub.

DIR/train.jsonl          one data set
DIR/validation.jsonl.gz
DIR/<name>/train.jsonl   a directory of data sets

The readers are ours: datasets reads 007 as a number, and gives all rows the keys of any.
"""

import csv
import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from loraloom.config.data import is_data_file
from loraloom.config.fields import suggestion
from loraloom.config.text import local_path, parse_json
from loraloom.errors import DataError, names_in, shown

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Fields of a row, faults or rows that a message names.
_MAX_NAMES = 20


class Fault(NamedTuple):
    """Why a row can't be used; the kind is the reason without the values of this row."""

    reason: str
    kind: str


class RowError(DataError):
    """A row can't be used."""

    def __init__(self, message: str = "", kind: str = ""):
        super().__init__(message)
        self.kind = kind


class EmptyAnswerError(RowError):
    """A row has nothing to learn where its answer should be."""


class Row(dict[str, Any]):
    """A row's fields, with its file and line; `fault` says why it could not be read, if so."""

    def __init__(self, fields: Mapping[str, Any], origin: str, fault: Fault | None = None):
        super().__init__(fields)
        self.origin = origin
        self.fault = fault

    def __missing__(self, name: str) -> NoReturn:
        if self.fault is not None:
            self.reject(self.fault.reason, self.fault.kind)
        missing = f"the row has no field {name!r}"
        self.reject(f"{missing}; its fields are {fields_of(self)}", missing)

    def reject(self, reason: str, kind: str = "") -> NoReturn:
        """Raise an error; its kind is needed if the reason quotes values of the row."""
        raise RowError(f"{self.origin}: {reason}", kind or reason)

    def reject_empty(self, reason: str) -> NoReturn:
        advice = "fill it in, remove the row, or set on_empty: skip"
        raise EmptyAnswerError(f"{self.origin}: {reason}; {advice}", reason)

    def text(self, name: str) -> str:
        value = self[name]
        if isinstance(value, str):
            return value
        expected = f"field {name!r} must be a string"
        advice = "use quotes" if isinstance(value, bool | int | float) else "write a text"
        self.reject(f"{expected}, got {shown(value)}; {advice}", f"{expected}; {advice}")

    def answer(self, name: str) -> str:
        text = ""
        if self[name] not in (None, []):
            text = self.text(name)
        if not text.strip():
            self.reject_empty(f"field {name!r} is empty, so there is nothing to learn")
        return text


def check_faults(faults: Mapping[str, Fault], num_rows: int) -> None:
    """Refuse rows that can't be used, by their origins, all of them in one message."""
    if not faults:
        return
    if len(faults) == 1:
        ((origin, fault),) = faults.items()
        raise DataError(f"{origin}: {fault.reason}")
    file = ""
    reasons_of_kind = defaultdict[str, dict[str, str]](dict)
    for origin, fault in faults.items():
        file, _, row = origin.rpartition(", ")
        reasons_of_kind[fault.kind][row] = fault.reason
    lines = [f"{file}: {len(faults)} of {num_rows} rows can't be used:"]
    for reasons in islice(reasons_of_kind.values(), _MAX_NAMES):
        lines.append(f"  {_describe_rows(reasons)}")
    num_left = len(reasons_of_kind) - _MAX_NAMES
    if num_left > 0:
        lines.append(f"  and {num_left} other faults")
    raise DataError("\n".join(lines))


def _describe_rows(reasons: Mapping[str, str]) -> str:
    """Describe rows with a fault of the same kind, by the reason of the first."""
    first, reason = next(iter(reasons.items()))
    if len(reasons) == 1:
        return f"{first}: {reason}"
    unit = first.split()[0]  # line or row
    numbers = names_in([row.split()[1] for row in reasons], _MAX_NAMES)
    text = f"{len(reasons)} rows, {unit}s {numbers}: {reason}"
    return text if len({*reasons.values()}) == 1 else f"{text} (as in {first})"


def fields_of(row: Mapping[str, Any]) -> str:
    """Name a row's fields in quotes, which show a space at the end of one."""
    return names_in([shown(name) for name in row], _MAX_NAMES) or "none"


def fields_of_all(rows: Sequence[Row]) -> Row:
    """Merge rows, one at least, into one with every field, each with its first value."""
    readable = [row for row in rows if not row.fault] or [*rows[:1]]
    fields: dict[str, Any] = {}
    for row in reversed(readable):
        fields.update(row)
    return Row(fields, readable[0].origin, readable[0].fault)


def rows_of_file(path: Path, start: int = 0) -> Iterator[Row]:
    """Yield a file's rows; a missing file raises at the call, not at the first row."""
    if not path.is_file():
        names = sorted(entry.name for entry in path.parent.glob("*"))
        listed = names_in(names, _MAX_NAMES) or "nothing"
        hint = f"{suggestion(path.name, names)}{path.parent} has {listed}"
        raise DataError(f"{path}: no such file or directory; {hint}")
    if not is_data_file(str(path)):
        kinds = ", ".join(_READERS)
        raise DataError(f"{path}: a data file must end in one of {kinds} (.gz may follow)")
    return islice(_rows_of(path), start, None)


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> Any:
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    if _suffix(path) == ".parquet":
        return opener(path, "rb")
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _rows_of(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            for position, value in _READERS[_suffix(path)](file):
                origin = f"{path}, {position}"
                if isinstance(value, dict):
                    yield Row(value, origin)
                elif isinstance(value, Fault):
                    yield Row({}, origin, value)
                else:
                    expected = "a row must be a JSON object"
                    reason = f"{expected}, got {type(value).__name__}"
                    yield Row({}, origin, Fault(reason, expected))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:
        # of the disk, of gzip, of pyarrow: some dozen unrelated types
        advice = "is it whole, in UTF-8, and of the kind that its name says?"
        raise DataError(f"{path}: the file can't be read: {error}; {advice}") from error


# A row's line or number, and its value, or its fault.
_Read = Iterator[tuple[str, Any]]


def _read_json_lines(file: Any) -> _Read:
    # JSON's texts may hold other line breaks than the one that ends a row
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line.rstrip("\r\n"), "the row", DataError)
        except DataError as error:
            value = Fault(str(error).replace(" line 1", "", 1), "the row must be JSON")
        yield f"line {number}", value


def _read_json(file: Any) -> _Read:
    first = next((line for line in file if line.strip()), "").lstrip()
    file.seek(0)
    if first.strip() == "{":
        raise DataError("a .json file must contain a list of rows, or one row per line")
    # JSON lines under the wrong name, as often on the hub
    if not first.startswith("["):
        yield from _read_json_lines(file)
        return
    values = parse_json(file.read(), "the list", DataError)
    for number, value in enumerate(values, start=1):
        yield f"row {number}", value


def _read_csv(file: Any) -> _Read:
    # Python's own limit, 128 KB, is for all readers of a process
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(file, strict=True)
    columns = reader.fieldnames or ()
    if len(set(columns)) < len(columns):
        raise DataError("columns must have different names; rename a column")
    if len(columns) == 1 and {";", "\t"} & {*columns[0]}:
        raise DataError(f"columns must be separated by commas, got the header {columns[0]!r}")
    try:
        for row in reader:
            # a text in quotes may have line breaks of its own
            num_breaks = sum(str(value).count("\n") for value in row.values())
            position = f"line {reader.line_num - num_breaks}"
            if None in row:
                reason = f"a row must have at most {len(columns)} columns, got more"
                reason += "; put texts with commas into quotes"
                yield position, Fault(reason, reason)
            else:
                yield position, {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        position = f"line {reader.reader.line_num}"
        raise DataError(f"{position}: not valid CSV: {error}; mend the quotes") from error


def _read_plain_text(file: Any) -> _Read:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def _read_parquet(file: Any) -> _Read:
    from pyarrow import parquet

    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(1000):
        for record in batch.to_pylist():
            number += 1
            # what JSON has no form for, dates and decimals, as texts; NaN is pandas' nothing
            written = json.dumps(record, default=_text_of)
            fields = json.loads(written, parse_constant=lambda _: None)
            yield f"row {number}", {name: without_nulls(value) for name, value in fields.items()}


def _text_of(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value)


def without_nulls(value: Any) -> Any:
    """A value of a table, which has null where an object lacks a key that others have."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


_READERS: dict[str, Callable[[Any], _Read]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_plain_text,
    ".parquet": _read_parquet,
}


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub, pinned to a revision where one is given."""

    repository: str
    config: str | None = None
    revision: str | None = None


def find_location(location: str, split: str, config: str | None = None) -> Path | HubSource:
    path = local_path(location, "dataset", DataError)
    if path.is_dir():
        if config is not None:
            raise DataError(f"{path}: config is only for data sets on the Hub; remove config")
        return find_split(split_files(path), split, path)
    if path.exists() or is_data_file(location) or not _HUB_ID.fullmatch(location):
        return path
    return HubSource(location, config)


def split_files(directory: Path) -> dict[str, Path]:
    """The file of each split of a data set; where it has several, the plainest kind's."""
    files: dict[str, Path] = {}
    for ending in [f"{suffix}{gz}" for suffix in reversed(_READERS) for gz in (".gz", "")]:
        for file in directory.glob(f"*{ending}"):
            files[file.name.removesuffix(ending)] = file
    return files


def find_split(files: Mapping[str, Path], split: str, name: object) -> Path:
    if split in files:
        return files[split]
    names = ", ".join(sorted(files)) or f"none; add {split}.jsonl"
    hint = f"{suggestion(split, files)}the splits are: {names}"
    raise DataError(f"{name} has no split {split!r}; {hint}")


def find_named(path: Path, name: str, split: str) -> Path:
    """The file of one split of the data set `name`; a single file may turn out to be missing."""
    path = local_path(path, "the path of data", DataError)
    if (path / name).is_dir():
        path /= name
    if path.is_dir():
        return find_split(split_files(path), split, path)
    split_of_file = path.name.partition(".")[0]
    if split_of_file in ("train", "validation", "test") and split_of_file != split:
        hint = f"as the file's name says, got {split!r}; rename the file, or name another split"
        raise DataError(f"{path}: split must be {split_of_file} {hint}")
    return path


def describe(location: object) -> dict[str, Any]:
    if isinstance(location, Path):
        return {"file": str(location), "sha256": sha256(location)}
    if isinstance(location, HubSource):
        hub = location.repository
        return {"hub": hub, "config": location.config, "revision": location.revision}
    return {"generated": "by loraloom"}


def sha256(path: Path) -> str:
    with path.expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(location: Path | HubSource, split: str = "", limit: int | None = None) -> list[Row]:
    rows = list(islice(RowStream(location, split).rows(), limit))
    check_faults({row.origin: row.fault for row in rows if row.fault}, len(rows))
    return rows


class RowStream:
    """Rows of a data set, which can be read from any of them on without those before."""

    def __init__(self, location: Path | HubSource, split: str):
        self.sizes: Mapping[str, int] = {}
        self._read: Callable[[int], Iterator[Row]]
        if isinstance(location, Path):
            rows_of_file(location)  # is it there?
            self.sizes = {location.name: location.stat().st_size}
            self._name = str(location)
            self._read = partial(rows_of_file, location)
        else:
            self._name = location.repository
            table = _load_from_hub(location, split)
            self._read = partial(_rows_of_table, table, f"{location.repository}, {split}")

    def rows(self, start: int = 0) -> Iterator[Row]:
        num_rows = start
        for row in self._read(start):
            num_rows += 1
            yield row
        if num_rows == 0:
            raise DataError(f"{self._name} contains no rows; add rows, or name another data set")


def _rows_of_table(table: Any, name: str, start: int) -> Iterator[Row]:
    rows = table.select(range(start, len(table)))
    for number, record in enumerate(rows, start=start + 1):
        fields = {field: without_nulls(value) for field, value in record.items()}
        yield Row(fields, f"{name}, row {number}")


def _load_from_hub(source: HubSource, split: str) -> Any:
    """A table on the disk, of which only the rows that are read are in memory."""
    import datasets

    try:
        return datasets.load_dataset(
            source.repository, source.config, revision=source.revision, split=split
        )
    except Exception as error:
        # of the network, of damaged files, of datasets: some dozen types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{source.repository}: the data set's split {split!r} could not be loaded from the "
            f"Hugging Face Hub: {reason}; without a network, pass the path of a local copy"
        ) from error
