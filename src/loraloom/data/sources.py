"""One source of training data: its rows, encoded as its format says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import SourceConfig
from loraloom.data.chat import encode_conversations
from loraloom.data.chat_template import TRAINING_DAY, given_source, load_chat_template
from loraloom.data.encode_once import encode_once
from loraloom.data.encoding import (
    EncodedRow,
    encode_completions,
    encode_documents,
    encode_each,
)
from loraloom.data.locations import read_rows, stream_rows
from loraloom.data.preferences import encode_preferences, encode_text_pairs
from loraloom.data.prompts import (
    instruction_columns,
    load_template,
    read_instruction,
    template_source,
)
from loraloom.data.rows import Row, check_faults
from loraloom.data.tasks import find_task
from loraloom.errors import DataError, shown


@dataclass(frozen=True)
class LoadedSource:
    """A source's rows as token ids."""

    name: str
    rows: list[EncodedRow]

    @property
    def num_empty(self) -> int:
        """Rows without an answer."""
        return sum(row.is_empty for row in self.rows)


def load_source(
    config: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
    *,
    as_pairs: bool = False,
    limit: int | None = None,
) -> LoadedSource:
    """Read and encode a source; arguments as in `read_source`."""
    rows, source = read_source(config, tokenizer, max_length, split, as_pairs=as_pairs, limit=limit)
    check_encoded(config, rows, source.rows)
    if not any(row.pieces for row in source.rows):
        raise DataError(
            f"{source.name}: none of the {len(rows)} rows has an answer that fits "
            f"max_length={max_length}; raise it"
        )
    return source


def read_source(
    config: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
    *,
    as_pairs: bool = False,
    limit: int | None = None,
    streaming: bool = False,
) -> tuple[list[Row], LoadedSource]:
    """Read a source's rows, and encode them; those that can't be used have their faults."""
    if config.task is not None:
        rows = find_task(config.task).load_rows(config.split or split, config.path)[:limit]
        return rows, _encode_task(config, rows, tokenizer, max_length, as_pairs)
    assert config.dataset is not None, "SourceConfig has a task or a dataset"
    location = (config.dataset, config.split or split, config.config)
    if streaming:
        rows = list(islice(stream_rows(*location).rows(), limit))
    else:
        rows = read_rows(*location)[:limit]
    if not rows:
        raise DataError(f"{config.dataset}: there are no rows; add some, or name another data set")
    first = next((row for row in rows if not row.fault), rows[0])
    encoded = encode_once(
        rows,
        lambda some: encode_rows(config, some, first, tokenizer, max_length),
        tokenizer,
        [config.format, config.fields, _template_text(config, tokenizer), max_length],
    )
    return rows, LoadedSource(config.dataset, encoded)


def check_encoded(config: SourceConfig, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> None:
    """Refuse rows that can't be used, unless they are empty and may be left out."""
    skips = config.on_empty == "skip"
    faults = [
        (row.origin, one.fault)
        for row, one in zip(rows, encoded, strict=True)
        if one.fault and not (one.is_empty and skips)
    ]
    check_faults(faults, len(rows))


def _encode_task(
    config: SourceConfig,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    as_pairs: bool,
) -> LoadedSource:
    task = find_task(config.task or "")
    scoring = config.scoring or task.scoring
    places = {id(row): place for place, row in enumerate(rows)}

    def read(row: Row) -> Any:
        if as_pairs:
            return task.preference_texts(row, places[id(row)], scoring)
        return task.training_text(row, scoring)

    def encode(texts: Sequence[Any]) -> list[EncodedRow]:
        encoder: Any = encode_text_pairs if as_pairs else encode_completions
        return encoder(tokenizer, texts, max_length)

    encoded = encode_each(
        rows,
        read,
        lambda texts: encode_once(texts, encode, tokenizer, [as_pairs, max_length]),
    )
    return LoadedSource(f"{task.name} ({scoring})", encoded)


def _template_text(config: SourceConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that rows are written out in."""
    match config.format:
        case "instruction":
            return template_source(config.template)
        case "chat" | "preference" if config.chat_template is not None:
            return given_source(tokenizer, config.chat_template)
        case "chat" | "preference":
            return str(tokenizer.chat_template)
        case _:
            return ""


def encode_rows(
    config: SourceConfig,
    rows: Sequence[Row],
    first: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[EncodedRow]:
    """Encode rows of a data set as its format says."""
    columns = config.fields or {}
    _check_columns(config, first)
    match config.format:
        case "chat":
            chats = load_chat_template(tokenizer, config.chat_template, TRAINING_DAY)
            return encode_conversations(tokenizer, chats, rows, columns, max_length)
        case "text":
            field = columns.get("text", "text")
            return encode_each(
                rows,
                lambda row: row.answer(field),
                lambda texts: encode_documents(tokenizer, texts, max_length),
            )
        case "preference":
            chat_template = config.chat_template
            return encode_preferences(tokenizer, rows, first, columns, max_length, chat_template)
        case _:
            template = load_template(config.template)
            names = instruction_columns(first, config.fields)
            return encode_each(
                rows,
                lambda row: read_instruction(row, names, template),
                lambda texts: encode_completions(tokenizer, texts, max_length),
            )


_NEEDED = {"instruction": ("instruction", "output"), "text": ("text",), "preference": ("chosen",)}


def _check_columns(config: SourceConfig, first: Row) -> None:
    """Refuse a data set whose first row lacks a column that its format or `fields` names."""
    if first.fault:
        return
    columns = dict(config.fields or {})
    if config.format == "instruction":
        columns = instruction_columns(first, config.fields)
        given = config.fields or {}
        columns = {role: name for role, name in columns.items() if role != "input" or role in given}
    else:
        columns |= {r: columns.get(r, r) for r in _NEEDED.get(config.format or "", ())}
    missing = [(role, name) for role, name in columns.items() if name not in first]
    if missing:
        role, column = missing[0]
        first.reject(
            f"the row has no field {column!r}, the {role} of format {config.format}; name its "
            f"column with fields: {{{role}: COLUMN}}, the row's are "
            f"{shown(list(first)).strip('[]') or 'none'}"
        )
