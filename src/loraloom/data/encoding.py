"""Sources of training data: their rows, encoded as their format says, and how prompts are written.

Token ids of sources with many rows are kept in datasets' cache, named by a hash of all that decides
what they are: rows, template, tokenizer, code. Processes that want the same wait for the first.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Template
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loraloom.config.data import FIELD_ROLES, PROMPT_TEMPLATES, DataConfig, PromptForm, SourceConfig
from loraloom.data import sources, templates, tokens
from loraloom.data.chat import learn_answers, read_conversation, read_messages, read_tools
from loraloom.data.sources import EmptyAnswerError, Row, RowStream
from loraloom.data.tasks import find_task
from loraloom.data.templates import TRAINING_DAY, ChatTemplate, Conversation
from loraloom.data.tokens import NO_LOSS, EncodedRow, Example, TextPair
from loraloom.errors import DataError, plain

# Rows from which on reading tokens is worth a file.
MIN_ROWS = 5000
# Rows of a stream that show how prompts are written.
STREAM_ROWS = 100
# Rows that are encoded, and read, at once.
_BLOCK = 1000
Item = TypeVar("Item")


@dataclass(frozen=True)
class SourceEncoder:
    """Reads and encodes the rows of a source; a task's as pairs of answers if these are learned."""

    config: SourceConfig
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    as_pairs: bool = False

    @cached_property
    def _start(self) -> list[int]:
        return tokens.leading_tokens(self.tokenizer)

    @property
    def name(self) -> str:
        task = self.config.task
        if task is None:
            return self.config.dataset or ""
        found = find_task(task)
        return f"{found.name} ({self.config.scoring or found.config.scoring})"

    def load(self, split: str, limit: int | None = None) -> list[EncodedRow]:
        rows, encoded = self.read(split, limit)
        self.check(rows, encoded)
        if not any(row.pieces for row in encoded):
            raise DataError(
                f"{self.name}: none of the {len(rows)} rows has an answer that fits "
                f"max_length={self.max_length}; raise max_length, or fill in empty answers"
            )
        return encoded

    def check(self, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> None:
        # a stream that is shorter than a block has rows in it several times
        faults = {
            row.origin: one.fault
            for row, one in zip(rows, encoded, strict=True)
            if one.fault and not (one.is_empty and self.config.on_empty == "skip")
        }
        sources.check_faults(list(faults.items()), len({row.origin for row in rows}))

    def notes(self, rows: Sequence[EncodedRow]) -> list[str]:
        """What became of rows that could not be used as they are."""
        cut, empty = sum(row.is_cut for row in rows), sum(row.is_empty for row in rows)
        dropped = sum(not row.pieces for row in rows) - empty
        unk: Any = self.tokenizer.unk_token_id
        unk = None if unk == self.tokenizer.eos_token_id else unk
        unknown = sum(piece.labels.count(unk) for row in rows for piece in row.pieces)
        notes = {
            f"{unknown} tokens in the loss are {self.tokenizer.unk_token}": unknown,
            f"{cut} cut or divided to fit max_length={self.max_length}": cut,
            f"{empty} skipped because of empty answers": empty,
            f"{dropped} dropped because their answers do not fit": dropped,
        }
        return [note for note, number in notes.items() if number]

    def read(
        self, split: str, limit: int | None = None, *, streaming: bool = False
    ) -> tuple[list[Row], list[EncodedRow]]:
        config = self.config
        if config.task is not None:
            rows = find_task(config.task).load_rows(config.split or split, config.path)[:limit]
            return rows, self._encode_task(rows)
        rows = list(islice(self.open(split, streaming=streaming).rows(), limit))
        template = self.tokenizer.chat_template
        if config.format == "instruction" or config.template is not None:
            template = templates.template_source(config.template)
        elif config.chat_template is not None:
            template = templates.given_source(self.tokenizer, config.chat_template)
        settings = [config.format, config.fields, template, self.max_length]
        encode = partial(self.encode, first=sources.fields_of_all(rows))
        return rows, _encode_once(rows, encode, self.tokenizer, settings)

    def prompts(self, split: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield what rows ask: content, a text or messages, fields of templates, tools, origin."""
        config, split = self.config, self.config.split or split
        if config.task is not None:
            task = find_task(config.task)
            scoring = config.scoring or task.config.scoring
            for n, row in enumerate(task.load_rows(split, config.path)[:limit]):
                yield {"content": task.training_texts(row, n, scoring)[0][0], "origin": row.origin}
            return
        rows = list(islice(self.open(split, streaming=False).rows(), limit))
        sources.check_faults([(row.origin, row.fault) for row in rows if row.fault], len(rows))
        columns = self._columns(sources.fields_of_all(rows), asks=True)
        for row in rows:
            with suppress(EmptyAnswerError):
                yield {**self._asked(row, columns), "origin": row.origin}

    def _asked(self, row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
        data_format = self.config.format or "text"
        if data_format == "chat":
            whole = read_conversation(row, self.config.fields)
            messages = list(takewhile(lambda one: one["role"] != "assistant", whole.messages))
            return {"content": tuple(messages), "tools": whole.tools}
        column = columns[{"preference": "prompt"}.get(data_format, data_format)]
        answers = [
            columns[role] for role in ("chosen", "rejected") if row.get(columns.get(role, ""))
        ]
        if isinstance(row.get(column), list):
            content = read_messages(row, column)
        elif any(isinstance(row[answer], list) for answer in answers):
            both = [read_messages(row, answer) for answer in answers]
            content = both[0][: tokens.count_shared(both[0], both[-1])]
            while content and content[-1]["role"] == "assistant":
                content.pop()  # the same in both
        else:
            text = row.answer(column) if data_format == "text" else row.text(column)
            given = row.get(columns["input"]) if "input" in columns else None
            return {"content": text, "fields": {**row, "input": given}}
        return {"content": tuple(content), "tools": read_tools(row, "tools")}

    def open(self, split: str, *, streaming: bool) -> RowStream:
        split = self.config.split or split
        found = sources.find_location(self.config.dataset or "", split, self.config.config)
        return RowStream(found, split, streaming=streaming)

    def encode(self, rows: Sequence[Row], first: Row) -> list[EncodedRow]:
        config, given, columns = self.config, self.config.chat_template, self._columns(first)
        answers = (row.get(columns.get("chosen", "")) for row in (first, *rows))
        read: Callable[[Row], Any]
        encode: Any
        match config.format:
            case "text":
                read, encode = lambda row: row.answer(columns["text"]), tokens.encode_documents
            case "instruction":
                template = templates.load_template(config.template)
                read = partial(templates.read_instruction, columns=columns, template=template)
                encode = tokens.encode_completions
            # of the first row that has an answer
            case "preference" if not isinstance(next(filter(None, answers), None), list):
                if given is not None:
                    first.reject(
                        "preferences between strings do not support chat_template; remove the key"
                    )
                template = None
                if config.template is not None:
                    template = templates.load_template(config.template)
                read = partial(_read_texts, columns, template)
                encode = tokens.encode_completion_pairs
            case _:
                if config.template is not None:
                    first.reject(
                        "preferences between messages do not support template; remove template"
                    )
                template = templates.load_chat_template(self.tokenizer, given, TRAINING_DAY)
                read = partial(self._read_chat, template)
                if config.format == "preference":
                    read = partial(self._read_chats, template, columns)
                return _encode_each(rows, read, list)
        return _encode_each(rows, read, partial(encode, self.tokenizer, max_length=self.max_length))

    def _columns(self, first: Row, *, asks: bool = False) -> dict[str, str]:
        data_format, given = self.config.format or "text", self.config.fields or {}
        columns = {role: given.get(role, role) for role in FIELD_ROLES[data_format]}
        if data_format == "instruction":
            columns = templates.instruction_columns(first, given)
        needed = {"instruction", "text"} | (set() if asks else {"output", "chosen", *given})
        for role, column in columns.items():
            if role in needed and column not in first and not first.fault:
                first.reject(
                    f"the row has no field {column!r}, the {role} of format {data_format}; name "
                    f"its column with fields: {{{role}: COLUMN}}, the row's are "
                    f"{sources.fields_of(first)}"
                )
        return columns

    def _read_chat(self, template: ChatTemplate, row: Row) -> EncodedRow:
        texts = learn_answers(template, row, read_conversation(row, self.config.fields))
        fitted = [tokens.fit(text, self._start, self.max_length) for text in texts]
        pieces = tuple(piece for text in fitted for piece in text.pieces)
        is_cut = any(text.is_cut or not text.pieces for text in fitted)
        return EncodedRow(pieces, is_cut=is_cut and bool(pieces))

    def _read_chats(self, template: ChatTemplate, columns: dict[str, str], row: Row) -> EncodedRow:
        """Two answers after the prompt's messages, or after the common beginning of both."""
        answers = [columns["chosen"], columns["rejected"]]
        both = [read_messages(row, name) for name in answers if row[name] or row.answer(name)]
        first = tokens.count_shared(*both)
        if isinstance(row.get(columns["prompt"]), list):
            prompt = read_messages(row, columns["prompt"])
            first, both = len(prompt), [[*prompt, *one] for one in both]
        elif both[0] == both[1]:
            row.reject("chosen and rejected are the same; remove the row, or name its prompt")
        tools, learnt = read_tools(row, "tools"), []
        for one in both:
            texts = learn_answers(template, row, Conversation(one, tools), first)
            if len(texts) > 1:
                row.reject(
                    "an answer of several turns must be one text, and the chat template writes its "
                    "earlier turns differently once others follow; set another chat_template"
                )
            learnt += texts
        return tokens.fit_pair(learnt[0], learnt[1], self._start, self.max_length)

    def _encode_task(self, rows: list[Row]) -> list[EncodedRow]:
        task = find_task(self.config.task or "")
        scoring = self.config.scoring or task.config.scoring
        kind: Any = tokens.encode_completion_pairs if self.as_pairs else tokens.encode_completions
        encode = partial(kind, self.tokenizer, max_length=self.max_length)
        places = count()

        def read(row: Row) -> Any:
            texts = task.training_texts(row, next(places), scoring)
            return texts if self.as_pairs else texts[0]

        settings, tokenizer = [self.as_pairs, self.max_length], self.tokenizer
        once = partial(_encode_once, encode=encode, tokenizer=tokenizer, settings=settings)
        return _encode_each(rows, read, once)


def _read_texts(
    columns: Mapping[str, str], template: Template | None, row: Row
) -> tuple[TextPair, TextPair]:
    prompt = row.text(columns["prompt"])
    if template is not None:
        parts = {"instruction": prompt, "input": templates.read_input(row, {"input": "input"})}
        prompt = templates.fill_in(template, row, "the prompt template", parts)
    return (prompt, row.answer(columns["chosen"])), (prompt, row.answer(columns["rejected"]))


def _encode_each(
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
            fault = str(error).removeprefix(plain(row.origin)).lstrip(":, ")
            if fault == str(error):
                raise
            is_empty = isinstance(error, EmptyAnswerError)
        encoded.append(EncodedRow((), fault=fault, is_empty=is_empty) if fault else None)
    rest = iter(encode(items))
    return [next(rest) if row is None else row for row in encoded]


def _encode_once(
    items: Sequence[Item],
    encode: Callable[[Sequence[Item]], list[EncodedRow]],
    tokenizer: PreTrainedTokenizerBase,
    settings: Sequence[Any],
) -> list[EncodedRow]:
    # a slow tokenizer can't be written as text, which would name an entry
    if len(items) < MIN_ROWS or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return encode(items)
    from datasets import Dataset, config
    from datasets.exceptions import DatasetGenerationError

    def records() -> Iterator[dict[str, str]]:
        for start in range(0, len(items), _BLOCK):
            yield from map(_as_record, encode(items[start : start + _BLOCK]))

    try:
        table: Any = Dataset.from_generator(
            records,
            cache_dir=str(Path(config.HF_DATASETS_CACHE) / "loraloom"),
            fingerprint=_key(items, tokenizer, settings),
        )
        return [_from_record(text) for batch in table.iter(_BLOCK) for text in batch["row"]]
    except (DatasetGenerationError, OSError, ValueError) as error:
        # of the tokenizer or a template
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        # the cache can't be written, or an entry is torn
        return encode(items)


def _as_record(row: EncodedRow) -> dict[str, str]:
    # JSON, as its lists of numbers are read faster than Arrow's
    pieces = [(x.input_ids, [int(label != NO_LOSS) for label in x.labels]) for x in row.pieces]
    return {"row": json.dumps([pieces, *row[1:]])}


def _from_record(text: str) -> EncodedRow:
    pieces, *rest = json.loads(text)
    # labels are the same objects as ids: two of each number would double what a data set takes
    examples = []
    for ids, marks in pieces:
        labels = (i if learnt else NO_LOSS for i, learnt in zip(ids, marks, strict=True))
        examples.append(Example(tuple(ids), tuple(labels)))
    return EncodedRow(tuple(examples), *rest)


def _key(items: Sequence[Any], tokenizer: PreTrainedTokenizerFast, settings: Sequence[Any]) -> str:
    told = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.split_special_tokens,
        [version(package) for package in ("transformers", "tokenizers", "jinja2")],
        *settings,
    ]
    digest = hashlib.sha256()
    # whoever changes how rows are encoded changes one of the modules next to this one
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for value in (told, *items):
        digest.update(json.dumps(value, default=repr).encode())
        digest.update(getattr(value, "fault", "").encode())
    return digest.hexdigest()


def given_form(
    tokenizer: PreTrainedTokenizerBase, template: str | None, chat_template: str | None
) -> PromptForm | None:
    if template is not None:
        return PromptForm(format="instruction", template=templates.template_source(template))
    if chat_template is None:
        return None
    source = templates.load_chat_template(tokenizer, chat_template).source()
    return PromptForm(format="chat", chat_template=source)


def prompt_form(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    """How a job's data writes prompts; of a mix, its first source, as all rows show."""
    source = data.sources[0]
    if source.format in (None, "text"):
        return PromptForm(format=source.format or "task")
    if source.format == "instruction" or source.template is not None:
        name = source.template or "alpaca"
        template = name if name in PROMPT_TEMPLATES else templates.template_source(name)
        return PromptForm(format="instruction", template=template)
    columns, systems = source.fields or {}, set()
    stream = SourceEncoder(source, tokenizer, 0).open("train", streaming=data.streaming)
    # of a stream only the beginning is known
    for row in islice(stream.rows(), STREAM_ROWS if data.streaming else None):
        names = [columns.get(role, role) for role in ("prompt", "chosen")]
        name = next((name for name in names if isinstance(row.get(name), list)), None)
        is_text = name is None and not systems and row.get(names[1])
        if source.format == "preference" and is_text:  # the first answer that there is
            return PromptForm(format="preference")
        # the row is skipped, or encoding will report it
        with suppress(DataError):
            is_chat = source.format == "chat"
            found = read_conversation(row, columns)[0] if is_chat else read_messages(row, str(name))
            systems.add(found[0]["content"] if found[0]["role"] == "system" else None)
        if len(systems) > 1 or None in systems:
            break
    template = source.chat_template and templates.given_source(tokenizer, source.chat_template)
    system = systems.pop() if len(systems) == 1 else None
    return PromptForm(format="chat", chat_template=template, system=system)
