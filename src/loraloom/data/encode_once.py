"""Token ids of data sets with many rows, kept in datasets' cache, so that they are encoded once.

An entry is named by a hash of all that decides what is in it: the rows, how they are written out,
the tokenizer, the code. Processes that want the same one wait for the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loraloom.data.encoding import EncodedRow, Piece
from loraloom.data.examples import NO_LOSS
from loraloom.errors import DataError

MIN_ROWS = 5000
"""Rows from which on reading is worth a file."""

_BLOCK = 1000
"""Rows that are encoded, and read, at once."""

Item = TypeVar("Item")


def encode_once(
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
    from datasets import Dataset, Features, List, Value, config
    from datasets.exceptions import DatasetGenerationError

    fields = ("is_cut", "is_pair", "is_empty", "fault")
    kinds = {"input_ids": List(List(Value("int32"))), "is_learnt": List(List(Value("bool")))}
    kinds |= {name: Value("string" if name == "fault" else "bool") for name in fields}

    def records() -> Iterator[dict[str, Any]]:
        for start in range(0, len(items), _BLOCK):
            for row in encode(items[start : start + _BLOCK]):
                ids = [piece.input_ids for piece in row.pieces]
                learnt = [[label != NO_LOSS for label in piece.labels] for piece in row.pieces]
                rest = {name: getattr(row, name) for name in fields}
                yield {"input_ids": ids, "is_learnt": learnt, **rest}

    try:
        table = Dataset.from_generator(
            records,
            features=Features(kinds),
            cache_dir=str(Path(config.HF_DATASETS_CACHE) / "loraloom"),
            fingerprint=_key(items, tokenizer, settings),
        )
        batches = table.with_format("arrow").iter(_BLOCK)
        rows = [row for batch in batches for row in _rows(batch, fields)]
    except (DatasetGenerationError, OSError) as error:
        if isinstance(error.__cause__, DataError):  # of the tokenizer or a template
            raise error.__cause__ from None
        return encode(items)  # the cache can't be written
    return rows


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


def _rows(batch: Any, fields: Sequence[str]) -> Iterator[EncodedRow]:
    """Make rows of a table's columns; a number that comes twice is one object."""
    columns = {name: batch[name].combine_chunks() for name in batch.column_names}
    pieces, learnt = columns["input_ids"].flatten(), columns["is_learnt"].flatten().flatten()
    ids = pieces.flatten().to_numpy()
    numbers = np.array([*range(ids.max(initial=-1) + 1), NO_LOSS], dtype=object)
    labels = np.where(learnt.to_numpy(zero_copy_only=False), ids, -1)  # the last, NO_LOSS
    all_ids, all_labels = iter(numbers[ids].tolist()), iter(numbers[labels].tolist())
    lengths = iter(pieces.value_lengths().to_pylist())
    counts = columns["input_ids"].value_lengths().to_pylist()
    for count, *state in zip(counts, *(columns[name].to_pylist() for name in fields), strict=True):
        own = tuple(
            Piece(tuple(islice(all_ids, length)), tuple(islice(all_labels, length)))
            for length in islice(lengths, count)
        )
        yield EncodedRow(own, **dict(zip(fields, state, strict=True)))
