"""Where data sets are: a file, a directory with a file for each split, or the hub.

DIR/train.jsonl          one data set
DIR/validation.jsonl.gz
DIR/<name>/train.jsonl   a directory of data sets
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from loraloom.config.faults import suggestion
from loraloom.config.paths import local_path
from loraloom.data.files import SUFFIXES, entries_of, is_data_file, read_all, rows_of_file
from loraloom.data.rows import Row
from loraloom.errors import DataError

_SPLITS = ("train", "validation", "test")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class SplitFiles:
    """A data set of local files, one a split. `name` is what messages call it."""

    name: str
    files: Mapping[str, Path]

    def find(self, split: str) -> Path:
        """The file of a split."""
        if split not in self.files:
            raise DataError(
                f"{self.name}: no split {split!r} there; {suggestion(split, self.files)}"
                f"the splits are: {', '.join(sorted(self.files)) or f'none, {split}.jsonl say'}"
            )
        return self.files[split]


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub, pinned to a revision where one is given."""

    repository: str
    config: str | None = None
    revision: str | None = None


def read_rows(location: str, split: str, config: str | None = None) -> list[Row]:
    """The rows of one split of a file, a directory or a hub data set.

    A row that can't be read stands there with its fault.
    """
    found = find_location(location, split, config)
    return read_all(found) if isinstance(found, Path) else read_hub(found, split)


def stream_rows(location: str, split: str, config: str | None = None) -> RowStream:
    """The same rows one after the other; those of the hub are not kept on the disk."""
    return RowStream(find_location(location, split, config), split)


def find_location(location: str, split: str, config: str | None) -> Path | HubSource:
    """Find the file that a split is in, or the data set on the hub; arguments as in `read_rows`."""
    path = local_path(location, "dataset", DataError)
    if path.is_dir():
        if config is not None:
            raise DataError(
                f"{path}: config must be of a data set on the hub, and this is a directory"
            )
        return _find_split(path, split)
    if path.exists() or is_data_file(path) or not _HUB_ID.fullmatch(location):
        return path
    return HubSource(location, config)


StreamState = dict[str, Any]
"""A place in a stream, in plain values."""


class RowStream:
    """Rows of a data set, which can be read on from a place that another process had reached.

    A place in a file is a number of rows, which are passed over unparsed; in a data set of the hub
    it is datasets' own. `sizes` are the bytes of local files, by name.
    """

    def __init__(self, found: Path | HubSource, split: str):
        self._found, self._split, self._num_rows = found, split, 0
        self.sizes: Mapping[str, int] = {}
        if isinstance(found, Path):
            rows_of_file(found)  # is it there?
            self.sizes = {found.name: found.stat().st_size}
        else:
            self._table = _load_from_hub(found, split, streaming=True)

    def rows(self, state: StreamState | None = None) -> Iterator[Row]:
        """Read from there on, or from the beginning; what was begun before ends."""
        self._num_rows = 0 if state is None else state["row"]
        for row in self._read(state):
            self._num_rows += 1
            yield row

    def state_dict(self) -> StreamState:
        """Return the place after the last row that was read."""
        of_hub = isinstance(self._found, HubSource)
        return {"row": self._num_rows, **({"dataset": self._table.state_dict()} if of_hub else {})}

    def _read(self, state: StreamState | None) -> Iterator[Row]:
        if isinstance(self._found, Path):
            yield from rows_of_file(self._found, self._num_rows)
            return
        self._table.load_state_dict(None if state is None else state["dataset"])
        try:
            for number, record in enumerate(self._table, start=self._num_rows + 1):
                yield _hub_row(self._found, self._split, number, record)
        except Exception as error:  # of the network, of damaged files, of datasets itself
            _reject_hub(self._found, self._split, error)


def find_named(path: Path, name: str, split: str) -> Path:
    """The file of one split of the data set `name`; a single file may turn out to be missing."""
    path = local_path(path, "the path of data", DataError)
    if not path.is_dir():
        return _check_single_file(path, split)
    if (path / name).is_dir():
        return _find_split(path / name, split)
    if not _split_files(path):
        names = [entry.name for entry in entries_of(path) if entry.is_dir()]
        raise DataError(
            f"{path}: no data set {name!r} there; {suggestion(name, names)}"
            f"the data sets are: {', '.join(names[:20]) or 'none'}"
        )
    return _find_split(path, split)


def find_splits(path: Path, name: str, *, alone: bool) -> dict[str, Path]:
    """The file of each split of the data set `name`; none where there is no such data set."""
    path = local_path(path, "the path of data", DataError)
    if not path.is_dir():
        raise DataError(f"{path}: there is no such directory of data sets")
    if (path / name).is_dir():
        return _split_files(path / name)
    return _split_files(path) if alone else {}


def read_hub(source: HubSource, split: str) -> list[Row]:
    """The rows of one split of a hub data set; they are downloaded once and cached."""
    table = _load_from_hub(source, split)
    rows = [_hub_row(source, split, *numbered) for numbered in enumerate(table, start=1)]
    if not rows:
        raise DataError(f"{source.repository}: the split {split!r} has no rows")
    return rows


def _load_from_hub(source: HubSource, split: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            source.repository, source.config, revision=source.revision, split=split, **options
        )
    except Exception as error:  # datasets raises some dozen unrelated types
        _reject_hub(source, split, error)


def _reject_hub(source: HubSource, split: str, error: Exception) -> NoReturn:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    raise DataError(
        f"{source.repository}: the data set's split {split!r} could not be loaded from the "
        f"Hugging Face hub: {reason}; give the path of a local copy where there is no network"
    ) from error


def _hub_row(source: HubSource, split: str, number: int, record: dict[str, Any]) -> Row:
    return Row(record, f"{source.repository}, {split}, row {number}")


def _check_single_file(path: Path, split: str) -> Path:
    named = path.name.split(".")[0]
    if named in _SPLITS and named != split:
        raise DataError(f"{path}: split must be {named} as the file's name says, got {split!r}")
    return path


def _find_split(directory: Path, split: str) -> Path:
    return SplitFiles(str(directory), _split_files(directory)).find(split)


def _split_files(directory: Path) -> dict[str, Path]:
    """The file of each split, the first suffix of SUFFIXES where there are two."""
    found: dict[str, Path] = {}
    for suffix in reversed(SUFFIXES):
        for ending in (f"{suffix}.gz", suffix):
            for path in directory.glob(f"*{ending}"):
                found[path.name.removesuffix(ending)] = path
    return found
