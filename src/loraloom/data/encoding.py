"""Sources of training data: their rows, encoded as their format says, and how prompts are written.

Token ids of sources with many rows are kept in datasets' cache, so that they are encoded once. An
entry is named by a hash of all that decides what is in it: the rows, how they are written out, the
tokenizer, the code. Processes that want the same one wait for the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loraloom.config.data import PROMPT_TEMPLATES, DataConfig, PromptForm, SourceConfig
from loraloom.data.chat import (
    TRAINING_DAY,
    ChatTemplate,
    given_source,
    learn_answers,
    load_chat_template,
)
from loraloom.data.messages import (
    Conversation,
    Message,
    read_conversation,
    read_messages,
    read_tools,
)
from loraloom.data.sources import EmptyAnswerError, Row, RowStream, check_faults, find_location
from loraloom.data.tasks import find_task
from loraloom.data.templates import (
    instruction_columns,
    load_template,
    read_instruction,
    template_source,
)
from loraloom.data.tokens import (
    NO_LOSS,
    EncodedRow,
    Example,
    count_shared,
    encode_completion_pairs,
    encode_completions,
    encode_documents,
    fit,
    fit_pair,
    leading_tokens,
)
from loraloom.errors import DataError, shown

MIN_ROWS = 5000
"""Rows from which on reading tokens is worth a file."""

_BLOCK = 1000
"""Rows that are encoded, and read, at once."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class LoadedSource:
    """A source's rows as token ids."""

    name: str
    rows: list[EncodedRow]

    @property
    def num_empty(self) -> int:
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
    rows = list(islice(open_source(config, split, streaming=streaming).rows(), limit))
    if not rows:
        raise DataError(f"{config.dataset}: there are no rows; add some, or name another data set")
    first = next((row for row in rows if not row.fault), rows[0])
    template = tokenizer.chat_template
    if config.format == "instruction":
        template = template_source(config.template)
    elif config.chat_template is not None:
        template = given_source(tokenizer, config.chat_template)
    encoded = _encode_once(
        rows,
        lambda some: encode_rows(config, some, first, tokenizer, max_length),
        tokenizer,
        [config.format, config.fields, template, max_length],
    )
    return rows, LoadedSource(config.dataset or "", encoded)


def open_source(config: SourceConfig, split: str, *, streaming: bool) -> RowStream:
    """Find the rows of a data set, in the split that is set or else the given one."""
    split = config.split or split
    return RowStream(
        find_location(config.dataset or "", split, config.config), split, streaming=streaming
    )


def check_encoded(config: SourceConfig, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> None:
    """Refuse rows that can't be used, unless they are empty and may be left out."""
    faults = [
        (row.origin, one.fault)
        for row, one in zip(rows, encoded, strict=True)
        if one.fault and not (one.is_empty and config.on_empty == "skip")
    ]
    check_faults(faults, len(rows))


def encode_rows(
    config: SourceConfig,
    rows: Sequence[Row],
    first: Row,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[EncodedRow]:
    """Encode rows of a data set as its format says; `first` says which columns there are."""
    columns = config.fields or {}
    _check_columns(config, first)
    match config.format:
        case "chat":
            chats = load_chat_template(tokenizer, config.chat_template, TRAINING_DAY)
            return encode_conversations(tokenizer, chats, rows, columns, max_length)
        case "preference":
            chat_template = config.chat_template
            return encode_preferences(tokenizer, rows, first, columns, max_length, chat_template)
        case "text":
            read: Callable[[Row], Any] = lambda row: row.answer(columns.get("text", "text"))  # noqa: E731
            encode: Any = encode_documents
        case _:
            names = instruction_columns(first, config.fields)
            read = partial(read_instruction, columns=names, template=load_template(config.template))
            encode = encode_completions
    return encode_each(rows, read, lambda texts: encode(tokenizer, texts, max_length))


def _check_columns(config: SourceConfig, first: Row) -> None:
    """Refuse a data set whose first row lacks a column that its format or `fields` names."""
    if first.fault:
        return
    given = columns = dict(config.fields or {})
    if config.format == "instruction":
        columns = instruction_columns(first, given)
        columns = {role: name for role, name in columns.items() if role != "input" or role in given}
    elif config.format in ("text", "preference"):
        needed = "text" if config.format == "text" else "chosen"
        columns = {**given, needed: given.get(needed, needed)}
    role, column = next(((r, name) for r, name in columns.items() if name not in first), (None, ""))
    if role is not None:
        first.reject(
            f"the row has no field {column!r}, the {role} of format {config.format}; name its "
            f"column with fields: {{{role}: COLUMN}}, the row's are "
            f"{shown(list(first)).strip('[]') or 'none'}"
        )


def encode_each(
    rows: Sequence[Row],
    read: Callable[[Row], Item],
    encode: Callable[[list[Item]], Sequence[EncodedRow]],
) -> list[EncodedRow]:
    """Read rows one by one and encode them together; a row that can't be used has its fault."""
    encoded: list[EncodedRow | None] = []
    items = []
    for row in rows:
        fault, is_empty = row.fault, False
        try:
            if not fault:
                items.append(read(row))
        except DataError as error:
            if not str(error).startswith(row.origin):
                raise
            fault = str(error).removeprefix(row.origin).lstrip(":, ")
            is_empty = isinstance(error, EmptyAnswerError)
        encoded.append(EncodedRow((), fault=fault, is_empty=is_empty) if fault else None)
    rest = iter(encode(items))
    return [next(rest) if row is None else row for row in encoded]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    max_length: int,
) -> list[EncodedRow]:
    """Conversations with a loss on what the assistant says; see `learn_answers`."""
    start = leading_tokens(tokenizer)

    def read(row: Row) -> EncodedRow:
        texts = learn_answers(tokenizer, template, row, read_conversation(row, columns))
        fitted = [fit(text, start, max_length) for text in texts]
        pieces = tuple(piece for text in fitted for piece in text.pieces)
        is_cut = any(text.is_cut or not text.pieces for text in fitted)
        return EncodedRow(pieces, is_cut=is_cut and bool(pieces))

    return encode_each(rows, read, list)


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    first: Row,
    columns: Mapping[str, str],
    max_length: int,
    chat_template: str | None = None,
) -> list[EncodedRow]:
    """Rows of `prompt`, `chosen` and `rejected` with a loss on both answers.

    Texts are read as they are, with an EOS after each answer. Where `chosen` and `rejected` are
    messages they follow those of `prompt`; without such a prompt, both are whole conversations and
    their common beginning is the prompt.
    """
    prompt, *answers = (columns.get(role, role) for role in ("prompt", "chosen", "rejected"))
    if isinstance(first[answers[0]], str):
        return encode_each(
            rows,
            lambda row: tuple((row.text(prompt), row.answer(name)) for name in answers),
            lambda pairs: encode_completion_pairs(tokenizer, pairs, max_length),
        )
    template = load_chat_template(tokenizer, chat_template, TRAINING_DAY)
    start = leading_tokens(tokenizer)

    def read(row: Row) -> EncodedRow:
        both = [read_messages(row, name) for name in answers]
        if isinstance(row.get(prompt), list):
            before = read_messages(row, prompt)
            first, both = len(before), [[*before, *messages] for messages in both]
        else:
            first = count_shared(*both)
        tools = read_tools(row, "tools")
        learnt = [
            learn_answers(tokenizer, template, row, Conversation(messages, tools), first)
            for messages in both
        ]
        if any(len(texts) > 1 for texts in learnt):
            row.reject(
                "an answer of several turns must be one text, and the chat template writes its "
                "earlier turns differently once others follow; give chat_template one that does not"
            )
        return fit_pair(learnt[0][0], learnt[1][0], start, max_length)

    return encode_each(rows, read, list)


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
    encoder: Any = encode_completion_pairs if as_pairs else encode_completions

    def read(row: Row) -> Any:
        if as_pairs:
            return task.preference_texts(row, places[id(row)], scoring)
        return task.training_text(row, scoring)

    def encode(texts: Sequence[Any]) -> list[EncodedRow]:
        settings = [as_pairs, max_length]
        return _encode_once(
            texts, lambda some: encoder(tokenizer, some, max_length), tokenizer, settings
        )

    return LoadedSource(f"{task.name} ({scoring})", encode_each(rows, read, encode))


def _encode_once(
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
    from datasets import Dataset, Features, Value, config
    from datasets.exceptions import DatasetGenerationError

    def records() -> Iterator[dict[str, str]]:
        for start in range(0, len(items), _BLOCK):
            yield from map(_as_record, encode(items[start : start + _BLOCK]))

    try:
        table = Dataset.from_generator(
            records,
            features=Features({"row": Value("large_string")}),
            cache_dir=str(Path(config.HF_DATASETS_CACHE) / "loraloom"),
            fingerprint=_key(items, tokenizer, settings),
        )
        return [_from_record(text) for batch in table.iter(_BLOCK) for text in batch["row"]]
    except (DatasetGenerationError, OSError) as error:
        if isinstance(error.__cause__, DataError):  # of the tokenizer or a template
            raise error.__cause__ from None
        return encode(items)  # the cache can't be written


def _as_record(row: EncodedRow) -> dict[str, str]:
    # JSON, as its lists of numbers are read faster than Arrow's
    pieces = [
        (one.input_ids, "".join("01"[label != NO_LOSS] for label in one.labels))
        for one in row.pieces
    ]
    return {"row": json.dumps([pieces, *row[1:]])}


def _from_record(text: str) -> EncodedRow:
    pieces, *rest = json.loads(text)
    return EncodedRow(
        tuple(
            Example(
                tuple(ids),
                # the same objects, as two of each number would double what a data set takes
                tuple(i if mark == "1" else NO_LOSS for i, mark in zip(ids, marks, strict=True)),
            )
            for ids, marks in pieces
        ),
        *rest,
    )


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
    """The modules next to this one: whoever changes how rows are encoded changes one of them."""
    return b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


def given_form(
    tokenizer: PreTrainedTokenizerBase, template: str | None, chat_template: str | None
) -> PromptForm | None:
    """The form that a prompt template or a chat template asks for; None without either."""
    if template is not None:
        return PromptForm(format="instruction", template=template_source(template))
    if chat_template is None:
        return None
    source = load_chat_template(tokenizer, chat_template).source()
    return PromptForm(format="chat", chat_template=source)


def prompt_form(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """How a job's data writes prompts; of a mix, how its first source does.

    The system message is kept where the first rows (100) all have the same one.
    """
    source = data.sources[0]
    match source.format:
        case None:
            return PromptForm(format="task")
        case "text":
            return PromptForm(format="text")
        case "instruction":
            name = source.template or "alpaca"
            template = name if name in PROMPT_TEMPLATES else template_source(name)
            return PromptForm(format="instruction", template=template)
    systems: set[str | None] = set()
    for row in islice(open_source(source, "train", streaming=data.streaming).rows(), 100):
        messages = _first_messages(source, row)
        if messages is None:
            return PromptForm(format="preference")
        if messages:
            first = messages[0]
            systems.add(first["content"] if first["role"] == "system" else None)
    template = source.chat_template and given_source(tokenizer, source.chat_template)
    system = systems.pop() if len(systems) == 1 else None
    return PromptForm(format="chat", chat_template=template, system=system)


def _first_messages(source: SourceConfig, row: Row) -> list[Message] | None:
    """The messages that a row begins with; None of a preference between texts."""
    columns = source.fields or {}
    names = [columns.get(role, role) for role in ("prompt", "chosen")]
    name = next((name for name in names if isinstance(row.get(name), list)), None)
    try:
        if source.format == "chat":
            return read_conversation(row, columns).messages
        return None if name is None else read_messages(row, name)
    except DataError:  # it is skipped, or encoding will report it
        return []
