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
from loraloom.data.encoding import EncodedRow, encode_completions, encode_documents
from loraloom.data.locations import read_rows, stream_rows
from loraloom.data.preferences import encode_preferences, encode_text_pairs
from loraloom.data.prompts import (
    instruction_columns,
    load_template,
    read_instruction,
    template_source,
)
from loraloom.data.rows import Row
from loraloom.data.tasks import find_task
from loraloom.errors import DataError


@dataclass(frozen=True)
class LoadedSource:
    """A source's rows as token ids."""

    name: str
    rows: list[EncodedRow]


def load_source(
    config: SourceConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    split: str,
    *,
    as_pairs: bool = False,
    limit: int | None = None,
    streaming: bool = False,
) -> LoadedSource:
    """Read and encode a source."""
    if config.task is not None:
        rows = find_task(config.task).load_rows(config.split or split, config.path)[:limit]
        source = _load_task(config, config.task, rows, tokenizer, max_length, as_pairs=as_pairs)
    else:
        assert config.dataset is not None, "SourceConfig has a task or a dataset"
        location = (config.dataset, config.split or split, config.config)
        if streaming:
            rows = list(islice(stream_rows(*location).rows(), limit))
            if not rows:
                raise DataError(f"{config.dataset}: there are no rows")
        else:
            rows = read_rows(*location)[:limit]
        encoded = _encode_data_set(config, config.dataset, rows, tokenizer, max_length)
        source = LoadedSource(config.dataset, encoded)
    if not any(row.pieces for row in source.rows):
        raise DataError(
            f"{source.name}: none of the {len(source.rows)} rows has an answer that fits "
            f"max_length={max_length}; raise it"
        )
    return source


def _load_task(
    config: SourceConfig,
    name: str,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    as_pairs: bool,
) -> LoadedSource:
    task = find_task(name)
    scoring = config.scoring or task.scoring
    if as_pairs:
        texts = [task.preference_texts(row, index, scoring) for index, row in enumerate(rows)]
        encode: Any = encode_text_pairs
    else:
        texts = [task.training_text(row, scoring) for row in rows]
        encode = encode_completions
    encoded = encode_once(
        task.name,
        texts,
        lambda some: encode(tokenizer, some, max_length),
        tokenizer,
        [as_pairs, max_length],
    )
    return LoadedSource(f"{task.name} ({scoring})", encoded)


def _encode_data_set(
    config: SourceConfig,
    name: str,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[EncodedRow]:
    def encode(some: Sequence[Row]) -> list[EncodedRow]:
        return encode_rows(config, some, rows[0], tokenizer, max_length)

    settings = [config.format, config.fields, _template_text(config, tokenizer), max_length]
    return encode_once(name, rows, encode, tokenizer, settings)


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
    for column in columns.values():  # a wrong name of an optional one would go unnoticed
        _ = first[column]
    match config.format:
        case "chat":
            chats = load_chat_template(tokenizer, config.chat_template, TRAINING_DAY)
            return encode_conversations(tokenizer, chats, rows, columns, max_length)
        case "text":
            field = columns.get("text", "text")
            texts = [_read_document(row, field) for row in rows]
            return encode_documents(tokenizer, texts, max_length)
        case "preference":
            chat_template = config.chat_template
            return encode_preferences(tokenizer, rows, first, columns, max_length, chat_template)
        case _:
            template = load_template(config.template)
            names = instruction_columns(first, config.fields)
            texts = [read_instruction(row, names, template) for row in rows]
            return encode_completions(tokenizer, texts, max_length)


def _read_document(row: Row, field: str) -> str:
    text = row.text(field)
    if not text:
        row.reject(f"field {field!r} must be a text to learn, it is empty")
    return text
