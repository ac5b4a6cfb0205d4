"""Sources of training data: rows, encoded as their format says, and how prompts are written."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Template
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PROMPT_TEMPLATES, DataConfig, PromptForm, SourceConfig
from loraloom.data import sources, templates, token_cache, tokens
from loraloom.data.chat import (
    DroppedToolsError,
    learn_answers,
    read_answer,
    read_conversation,
    read_messages,
    read_tools,
    read_variables,
)
from loraloom.data.sources import EmptyAnswerError, Fault, HubSource, Row, RowError, RowStream
from loraloom.data.tasks import find_task
from loraloom.data.templates import TRAINING_DAY, ChatTemplate, Conversation, Message
from loraloom.data.tokens import EncodedRow, Example, TextPair
from loraloom.errors import DataError, plain

# Rows of a stream that show how prompts are written.
STREAM_ROWS = 100
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
        choice_task = find_task(task)
        return f"{choice_task.name} ({self.config.scoring or choice_task.config.scoring})"

    def load(self, split: str, limit: int | None = None) -> list[EncodedRow]:
        rows = self._load_rows(split, limit)
        # a tokenizer in Python has state that no fingerprint covers
        if not self.tokenizer.is_fast or not token_cache.is_large(rows):
            return self._encode_usable(rows)
        encode = partial(self._encode_usable, rows)
        return token_cache.encode_once(rows, self.tokenizer, self._decisive_settings(), encode)

    def _encode_usable(self, rows: list[Row]) -> list[EncodedRow]:
        encoded = self._encode_rows(rows)
        self.check(rows, encoded)
        if not any(row.pieces for row in encoded):
            raise DataError(
                f"{self.name}: none of the {len(rows)} rows has an answer that fits "
                f"max_length={self.max_length}; raise max_length, or fill in empty answers"
            )
        return encoded

    def _decisive_settings(self) -> list[object]:
        """What decides the tokens of rows, with the texts of files that settings name."""
        config = self.config
        template = None
        if config.format == "instruction" or config.template is not None:
            template = templates.template_source(config.template)
        task = None
        if config.task is not None:
            task = find_task(config.task).config.model_dump_json()
        settings = config.model_dump_json(exclude={"weight", "expert_group"})
        return [settings, template, self.chat_source, task, self.as_pairs, self.max_length]

    def check(self, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> None:
        # a stream that is shorter than a block has rows in it several times
        skips_empty = self.config.on_empty == "skip"
        faults = {
            row.origin: result.fault
            for row, result in zip(rows, encoded, strict=True)
            if result.fault and not (result.is_empty and skips_empty)
        }
        sources.check_faults(faults, len({row.origin for row in rows}))

    def notes(self, rows: Sequence[EncodedRow]) -> list[str]:
        """What became of rows that could not be used as they are."""
        unk: Any = self.tokenizer.unk_token_id
        num_unknown = num_cut = num_empty = num_dropped = 0
        for row in rows:
            num_cut += row.is_cut
            num_empty += row.is_empty
            num_dropped += not (row.pieces or row.is_empty)
            if unk != self.tokenizer.eos_token_id:
                num_unknown += sum(piece.labels.count(unk) for piece in row.pieces)
        notes = {
            f"tokens in the loss are {self.tokenizer.unk_token}": num_unknown,
            f"cut or divided to fit max_length={self.max_length}": num_cut,
            "skipped because of empty answers": num_empty,
            "dropped because their answers do not fit": num_dropped,
        }
        return [f"{number} {note}" for note, number in notes.items() if number]

    def read(self, split: str, limit: int | None = None) -> tuple[list[Row], list[EncodedRow]]:
        rows = self._load_rows(split, limit)
        return rows, self._encode_rows(rows)

    def _load_rows(self, split: str, limit: int | None) -> list[Row]:
        config = self.config
        if config.task is not None:
            return find_task(config.task).load_rows(config.split or split, config.path)[:limit]
        return list(islice(self.open(split).rows(), limit))

    def _encode_rows(self, rows: list[Row]) -> list[EncodedRow]:
        if self.config.task is not None:
            return self._encode_task(rows)
        return self.encode(rows, first=sources.fields_of_all(rows))

    def prompts(self, split: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield what rows ask: content, a text or messages, fields of templates, tools, origin."""
        config = self.config
        split = config.split or split
        if config.task is not None:
            task = find_task(config.task)
            for index, row in enumerate(task.load_rows(split, config.path)[:limit]):
                right, _ = task.training_texts(row, index, config.scoring)
                yield {"content": right[0], "origin": row.origin}
            return
        rows = sources.read_rows(self._find(split), split, limit)
        columns = self._columns(sources.fields_of_all(rows), for_prompts=True)
        for row in rows:
            with suppress(EmptyAnswerError):
                yield {**self.read_prompt(row, columns), "origin": row.origin}

    def read_prompt(self, row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
        data_format = self.config.format or "text"
        if data_format == "chat":
            chat = read_conversation(row, self.config.fields)
            prompt = chat.messages[: chat.num_prompt_messages]
            others = chat.messages[chat.num_prompt_messages :]
            asked = takewhile(lambda message: message["role"] != "assistant", others)
            return {"content": (*prompt, *asked), "tools": chat.tools}
        if data_format == "preference":
            messages = _messages_before_answers(row, columns)
            if messages is not None:
                return {"content": tuple(messages), "tools": read_tools(row, columns["tools"])}
        column = columns["prompt" if data_format == "preference" else data_format]
        text = row.answer(column) if data_format == "text" else row.text(column)
        context = row.get(columns["input"]) if "input" in columns else None
        return {"content": text, "fields": {**row, "input": context}}

    def open(self, split: str) -> RowStream:
        split = self.config.split or split
        return RowStream(self._find(split), split)

    def _find(self, split: str) -> Path | HubSource:
        return sources.find_location(self.config.dataset or "", split, self.config.config)

    def encode(self, rows: Sequence[Row], first: Row) -> list[EncodedRow]:
        columns = self._columns(first)
        chosen = [row.get(columns.get("chosen", "")) for row in (first, *rows)]
        first_chosen = next(filter(None, chosen), None)
        read: Callable[[Row], Any]
        encode: Any
        match self.config.format:
            case "text":
                read = partial(Row.answer, name=columns["text"])
                encode = tokens.encode_documents
            case "instruction":
                template = templates.load_template(self.config.template)
                read = partial(templates.read_instruction, columns=columns, template=template)
                encode = tokens.encode_completions
            case "preference" if not isinstance(first_chosen, list):
                if self.config.chat_template is not None:
                    kind = "preferences between strings"
                    first.reject(f"{kind} do not support chat_template; remove the key")
                template = None
                if self.config.template is not None:
                    template = templates.load_template(self.config.template)
                read = partial(_read_texts, columns, template)
                encode = tokens.encode_completion_pairs
            case "preference":
                if self.config.template is not None:
                    kind = "preferences between messages"
                    first.reject(f"{kind} do not support template; remove template")
                read = partial(self._read_preference, columns)
                return _encode_each(rows, read, list)
            case _:  # chat
                return _encode_each(rows, self._read_chat, list)
        return _encode_each(rows, read, partial(encode, self.tokenizer, max_length=self.max_length))  # ty: ignore[invalid-argument-type]

    @property
    def chat_source(self) -> str | None:
        template = self.config.chat_template
        return None if template is None else templates.given_source(self.tokenizer, template)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_source, TRAINING_DAY)

    def _columns(self, first: Row, *, for_prompts: bool = False) -> dict[str, str]:
        data_format = self.config.format or "text"
        columns = self.config.columns
        required = {"instruction", "text"}
        if not for_prompts:
            required |= {"output", "chosen", *(self.config.fields or ())}
        for role, column in columns.items():
            if role in required and column not in first and not first.fault:
                first.reject(
                    f"the row has no field {column!r}, the {role} of format {data_format}; name "
                    f"its column with fields: {{{role}: COLUMN}}, the row's are "
                    f"{sources.fields_of(first)}"
                )
        return columns

    def _read_chat(self, row: Row) -> EncodedRow:
        pieces: list[Example] = []
        is_cut = False
        conversation = read_conversation(row, self.config.fields)
        for text in learn_answers(self._chat_template, row, conversation):
            fitted = tokens.fit(text, self._start, self.max_length)
            pieces += fitted.pieces
            is_cut |= fitted.is_cut or not fitted.pieces
        return EncodedRow(tuple(pieces), is_cut=is_cut and bool(pieces))

    def _read_preference(self, columns: dict[str, str], row: Row) -> EncodedRow:
        """Encode the chosen and the rejected answer.

        They follow the messages of `prompt` or, without one, the messages that both share.
        """
        chosen = read_answer(row, columns["chosen"])
        rejected = read_answer(row, columns["rejected"])
        num_prompt_messages = tokens.count_shared(chosen, rejected)
        if isinstance(row.get(columns["prompt"]), list):
            prompt = read_messages(row, columns["prompt"])
            num_prompt_messages = len(prompt)
            chosen, rejected = prompt + chosen, prompt + rejected
        elif chosen == rejected:
            row.reject("chosen and rejected are the same; remove the row, or name its prompt")
        tools = read_tools(row, columns["tools"])
        variables = read_variables(row, columns["chat_template_kwargs"])
        learned: list[Example] = []
        for messages in (chosen, rejected):
            conversation = Conversation(messages, tools, num_prompt_messages, variables)
            texts = learn_answers(self._chat_template, row, conversation)
            if len(texts) > 1:
                row.reject(
                    "an answer of several turns must be one text, and the chat template writes its "
                    "earlier turns differently once others follow; set another chat_template"
                )
            learned += texts
        return tokens.fit_pair(learned[0], learned[1], self._start, self.max_length)

    def _encode_task(self, rows: list[Row]) -> list[EncodedRow]:
        task = find_task(self.config.task or "")
        encode: Any = tokens.encode_completions
        if self.as_pairs:
            encode = tokens.encode_completion_pairs
        encode = partial(encode, self.tokenizer, max_length=self.max_length)
        indices = count()

        def read(row: Row) -> Any:
            texts = task.training_texts(row, next(indices), self.config.scoring)
            return texts if self.as_pairs else texts[0]

        return _encode_each(rows, read, encode)


def _messages_before_answers(row: Row, columns: Mapping[str, str]) -> Sequence[Message] | None:
    """The prompt of a preference between conversations; None if it is a text."""
    if isinstance(row.get(columns["prompt"]), list):
        return read_messages(row, columns["prompt"])
    answers = [columns[role] for role in ("chosen", "rejected") if row.get(columns[role])]
    if not any(isinstance(row[answer], list) for answer in answers):
        return None
    chats = [read_messages(row, answer) for answer in answers]
    content = chats[0][: tokens.count_shared(chats[0], chats[-1])]
    while content and content[-1]["role"] == "assistant":
        content.pop()  # the same in both
    return content


def _read_texts(
    columns: Mapping[str, str], template: Template | None, row: Row
) -> tuple[TextPair, TextPair]:
    prompt = row.text(columns["prompt"])
    if template is not None:
        parts = {"instruction": prompt, "input": templates.read_input(row, {"input": "input"})}
        prompt = templates.fill_in(template, row, "the prompt template", parts)
    chosen = row.answer(columns["chosen"])
    rejected = row.answer(columns["rejected"])
    return (prompt, chosen), (prompt, rejected)


def _encode_each(
    rows: Sequence[Row],
    read: Callable[[Row], Item],
    encode: Callable[[list[Item]], Sequence[EncodedRow]],
) -> list[EncodedRow]:
    """Read rows one by one and encode them together; a row that can't be used has its fault."""
    faulty: dict[int, EncodedRow] = {}
    items: list[Item] = []
    for index, row in enumerate(rows):
        if row.fault:
            faulty[index] = EncodedRow((), fault=row.fault)
            continue
        try:
            items.append(read(row))
        except DataError as error:
            reason = str(error).removeprefix(plain(row.origin)).lstrip(":, ")
            if reason == str(error):
                raise
            kind = error.kind if isinstance(error, RowError) else reason
            is_empty = isinstance(error, EmptyAnswerError)
            drops_tools = isinstance(error, DroppedToolsError)
            fault = Fault(reason, kind)
            faulty[index] = EncodedRow((), fault=fault, is_empty=is_empty, drops_tools=drops_tools)
    encoded = iter(encode(items))
    return [faulty.get(index) or next(encoded) for index in range(len(rows))]


def given_form(
    tokenizer: PreTrainedTokenizerBase, template: str | None, chat_template: str | None
) -> PromptForm | None:
    if template is not None:
        return PromptForm(format="instruction", template=templates.template_source(template))
    if chat_template is None:
        return None
    source = templates.given_source(tokenizer, chat_template)
    ChatTemplate(tokenizer, source)  # is it valid?
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
    systems: set[str | None] = set()
    variables: set[str | None] = set()
    encoder = SourceEncoder(source, tokenizer, 0)
    # of a stream only the beginning is known
    for row in islice(encoder.open("train").rows(), STREAM_ROWS if data.streaming else None):
        # a row with a fault is skipped, or encoding will report it
        with suppress(DataError):
            content = encoder.read_prompt(row, source.columns)["content"]
            if not isinstance(content, str):
                has_system = content and content[0]["role"] == "system"
                systems.add(content[0]["content"] if has_system else None)
                row_variables = read_variables(row, source.columns["chat_template_kwargs"])
                text = json.dumps(row_variables, sort_keys=True)
                variables.add(text if row_variables else None)
            elif not systems:
                return PromptForm(format="preference")  # the first prompt that there is
        if systems and _shared_value(systems) is None and _shared_value(variables) is None:
            break
    chat_template = encoder.chat_source
    shared_variables = _shared_value(variables)
    if shared_variables is not None:
        chat_template = templates.with_variables(
            ChatTemplate(tokenizer, chat_template).source(), json.loads(shared_variables)
        )
    system = _shared_value(systems)
    return PromptForm(format="chat", chat_template=chat_template, system=system)


def _shared_value(values: set[str | None]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None
