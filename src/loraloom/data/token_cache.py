"""Tokens of large sources in the cache of datasets, which a run that restarts reads.

The name of an entry is a fingerprint of everything that decides its tokens. The library locks an
entry, writes it aside and renames it: processes share it, and a killed one leaves nothing to read.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from loraloom.data.sources import Fault, Row
from loraloom.data.tokens import NO_LOSS, EncodedRow, Example
from loraloom.errors import LoraloomError

if TYPE_CHECKING:
    from datasets import Dataset, Features

_log = logging.getLogger(__name__)
# Encoding as many characters takes a core some three seconds; reading their tokens, a third of one.
MIN_CHARACTERS = 5_000_000
_ROWS_AT_ONCE = 1000
# What EncodedRow says with a truth value.
_FLAGS = [name for name, default in EncodedRow._field_defaults.items() if default is False]
# Packages that render templates and encode texts.
_ENCODERS = ("jinja2", "tokenizers", "transformers")


def is_large(rows: Sequence[Row]) -> bool:
    num_characters = 0
    for row in rows:
        num_characters += len(_as_json(row))
        if num_characters >= MIN_CHARACTERS:
            return True
    return False


def encode_once(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[object],
    encode: Callable[[], list[EncodedRow]],
) -> list[EncodedRow]:
    """Read what `encode` returned for equal rows, tokenizer and settings, or call it."""
    from datasets import Dataset, config
    from datasets.exceptions import DatasetGenerationError

    directory = Path(config.HF_DATASETS_CACHE) / "loraloom"
    encoded: list[EncodedRow] = []

    def generate_records() -> Iterator[dict[str, Any]]:
        encoded.extend(encode())
        yield from map(_as_record, encoded)

    try:
        table = Dataset.from_generator(
            generate_records,
            features=_features(),
            cache_dir=str(directory),
            fingerprint=_fingerprint(rows, tokenizer, settings),
        )
        return encoded or _read(table, len(rows))
    except (DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, LoraloomError):
            raise cause from None
        _log.warning(
            "The tokens of %d rows can't be kept in %s: %s. Work continues, and each start encodes "
            "the rows again. Delete the directory, or set HF_DATASETS_CACHE to another directory.",
            len(rows),
            directory,
            cause,
        )
    return encoded or encode()


def _features() -> "Features":
    from datasets import Features, List, Value

    columns: dict[str, Any] = {
        "pieces": List(List(Value("int32"))),
        "has_loss": List(List(Value("bool"))),
        "reason": Value("string"),
        "kind": Value("string"),
    }
    return Features(columns | {name: Value("bool") for name in _FLAGS})


def _as_record(row: EncodedRow) -> dict[str, Any]:
    input_ids: list[list[int]] = []
    has_loss: list[list[bool]] = []
    for piece in row.pieces:
        input_ids.append([*piece.input_ids])
        has_loss.append([label != NO_LOSS for label in piece.labels])
    reason, kind = row.fault or (None, None)
    flags = {name: getattr(row, name) for name in _FLAGS}
    return {"pieces": input_ids, "has_loss": has_loss, "reason": reason, "kind": kind, **flags}


def _read(table: "Dataset", num_rows: int) -> list[EncodedRow]:
    # a file that lost its end reads as a shorter one
    if table.num_rows != num_rows:
        raise ValueError(f"the entry has {table.num_rows} rows")
    encoded: list[EncodedRow] = []
    for batch in table.iter(_ROWS_AT_ONCE):
        columns: dict[str, list[Any]] = dict(batch)
        pieces = map(_as_examples, columns["pieces"], columns["has_loss"])
        faults = map(_as_fault, columns["reason"], columns["kind"])
        rows = [
            EncodedRow(examples, fault=fault)
            for examples, fault in zip(pieces, faults, strict=True)
        ]
        for number, row in enumerate(rows):
            encoded.append(row._replace(**{name: columns[name][number] for name in _FLAGS}))
    return encoded


def _as_fault(reason: str | None, kind: str | None) -> Fault | None:
    return None if reason is None else Fault(reason, kind or reason)


def _as_examples(input_ids: list[list[int]], has_loss: list[list[bool]]) -> tuple[Example, ...]:
    examples: list[Example] = []
    for ids, marks in zip(input_ids, has_loss, strict=True):
        # the same objects as ids: two of each number would double the memory
        labels = [x if is_label else NO_LOSS for x, is_label in zip(ids, marks, strict=True)]
        examples.append(Example(tuple(ids), tuple(labels)))
    return tuple(examples)


def _fingerprint(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, settings: Sequence[object]
) -> str:
    from datasets.fingerprint import Hasher

    # Hasher alone takes twenty times as long for rows
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_as_json(row).encode())
    versions = [version(package) for package in _ENCODERS]
    return Hasher.hash([digest.hexdigest(), tokenizer, *settings, *versions, _code_digest()])


def _as_json(row: Row) -> str:
    return json.dumps([row, row.fault], default=repr)


@cache
def _code_digest() -> str:
    """A hash of the modules that read and encode rows, which a new version may change."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in ("config", "data"):
        for file in sorted((package / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
