"""Token ids of data sets with many rows, kept in datasets' cache, so that they are encoded once.

An entry is a Parquet file named by a hash of all that decides what is in it: the rows, how they are
written out, the tokenizer, the code. It is written aside and renamed, its pages have checksums, and
one that can't be read is made again. Processes that want the same one wait for the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loraloom.data.encoding import EncodedRow, Piece
from loraloom.data.examples import NO_LOSS
from loraloom.durable import remove_leftovers, write_file

if TYPE_CHECKING:
    from pyarrow import RecordBatch

MIN_ROWS = 5000
"""Rows from which on reading is worth a file."""

_BLOCK = 1000
"""Rows that are encoded, and read, at once."""

_ABANDONED_S = 24 * 3600.0
"""Age of a file whose writer was killed."""

Item = TypeVar("Item")


def encode_once(
    name: str,
    items: Sequence[Item],
    encode: Callable[[Sequence[Item]], list[EncodedRow]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Any],
) -> list[EncodedRow]:
    """Encode rows, or read what came of them when they were encoded before.

    Few rows are encoded each time, and so are those of a tokenizer that can't be written as text,
    or where the cache has no such file and can't be written to.
    """
    if len(items) < MIN_ROWS or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return encode(items)
    from datasets.config import HF_DATASETS_CACHE

    key = _key(items, tokenizer, settings)
    file = Path(HF_DATASETS_CACHE) / "loraloom" / f"{key}.parquet"
    rows = _read(file, len(items))  # without the lock: a file that is there is whole
    if rows is not None:
        return rows
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            rows = _read(file, len(items))
            if rows is None:
                remove_leftovers(file.parent, older_than_s=_ABANDONED_S)
                write_file(file, partial(_write, _blocks(name, items, encode)))
                rows = _read(file, len(items))
    except (OSError, NotImplementedError):  # the latter where a file system has no locks
        rows = None
    return encode(items) if rows is None else rows


def _key(items: Sequence[Any], tokenizer: PreTrainedTokenizerFast, settings: Sequence[Any]) -> str:
    told = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.split_special_tokens,
        [version(package) for package in ("transformers", "tokenizers", "jinja2")],
        *settings,
    ]
    digest = hashlib.sha256(_code())
    for value in (told, *items):
        digest.update(json.dumps(value, default=repr).encode())
        digest.update(getattr(value, "fault", "").encode())
    return digest.hexdigest()


@cache
def _code() -> bytes:
    """The modules beside this one: whoever changes how rows are encoded changes one of them."""
    return b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


def _blocks(
    name: str, items: Sequence[Item], encode: Callable[[Sequence[Item]], list[EncodedRow]]
) -> Iterator[list[EncodedRow]]:
    from datasets.utils import tqdm

    with tqdm(total=len(items), desc=f"{name}: tokens", unit=" rows", disable=None) as bar:
        for start in range(0, len(items), _BLOCK):
            block = items[start : start + _BLOCK]
            yield encode(block)
            bar.update(len(block))


def _write(blocks: Iterator[list[EncodedRow]], file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def nested(kind: Any) -> Any:
        return pyarrow.list_(pyarrow.list_(kind))

    schema = pyarrow.schema(
        {
            "input_ids": nested(pyarrow.int32()),
            "is_learnt": nested(pyarrow.bool_()),
            "is_cut": pyarrow.bool_(),
            "is_pair": pyarrow.bool_(),
            "fault": pyarrow.string(),
            "is_empty": pyarrow.bool_(),
        }
    )
    with parquet.ParquetWriter(file, schema, write_page_checksum=True) as writer:
        for rows in blocks:
            columns = {
                "input_ids": [[piece.input_ids for piece in row.pieces] for row in rows],
                "is_learnt": [
                    [[label != NO_LOSS for label in piece.labels] for piece in row.pieces]
                    for row in rows
                ],
                "is_cut": [row.is_cut for row in rows],
                "is_pair": [row.is_pair for row in rows],
                "fault": [row.fault for row in rows],
                "is_empty": [row.is_empty for row in rows],
            }
            writer.write_table(pyarrow.table(columns, schema))


def _read(file: Path, num_rows: int) -> list[EncodedRow] | None:
    """Read a file; None if there is none, or it is not whole."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as entry:
            rows = [row for batch in entry.iter_batches(_BLOCK) for row in _rows(batch)]
    except Exception:  # names and sizes have no checksum: what is changed there decides the error
        return None
    return rows if len(rows) == num_rows else None


def _rows(batch: RecordBatch) -> Iterator[EncodedRow]:
    """Make rows of a batch's columns; a number that comes twice is one object."""
    pieces, learnt = batch["input_ids"].flatten(), batch["is_learnt"].flatten().flatten()
    ids = pieces.flatten().to_numpy()
    numbers = np.array([*range(ids.max(initial=-1) + 1), NO_LOSS], dtype=object)
    labels = np.where(learnt.to_numpy(zero_copy_only=False), ids, -1)  # the last, NO_LOSS
    all_ids, all_labels = iter(numbers[ids].tolist()), iter(numbers[labels].tolist())
    lengths = iter(pieces.value_lengths().to_pylist())
    counts = batch["input_ids"].value_lengths().to_pylist()
    rest = (batch[name].to_pylist() for name in ("is_cut", "is_pair", "fault", "is_empty"))
    for count, *state in zip(counts, *rest, strict=True):
        own = tuple(
            Piece(tuple(islice(all_ids, length)), tuple(islice(all_labels, length)))
            for length in islice(lengths, count)
        )
        yield EncodedRow(own, *state)
