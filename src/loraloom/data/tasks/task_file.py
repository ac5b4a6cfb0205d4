"""A choice task from a YAML file, without code; config/task.py says what the file may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError

from loraloom.config.data import Scoring, task_name
from loraloom.config.fields import check_name
from loraloom.config.loading import load_task_config
from loraloom.config.paths import local_path
from loraloom.config.task import TaskConfig, TaskDataConfig
from loraloom.data.locations import HubSource, SplitFiles
from loraloom.data.prompts import compile_template
from loraloom.data.rows import Row
from loraloom.data.tasks.choice_task import ChoiceForm, ChoiceTask, letters
from loraloom.data.templates import render
from loraloom.errors import ConfigError, DataError, shown

_MAX_LETTERS = 26

Reader = Callable[[Row], Any]
"""Reads a part of a row."""


def load_task(path: str | Path) -> ChoiceTask:
    """The task that a YAML file describes; its name is the file's, without the suffix."""
    config = load_task_config(path)
    try:
        name = check_name(task_name(str(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    form = _TaskForm(Path(path), config)
    return ChoiceTask(
        name=name,
        evaluation_split=config.evaluation_split,
        source=_source(config.data, Path(path)),
        by_label=lambda row: form.ask(row, "label"),
        by_text=lambda row: form.ask(row, "text"),
        scoring=config.scoring,
    )


def _source(data: TaskDataConfig | None, path: Path) -> HubSource | SplitFiles | None:
    if data is None:
        return None
    if data.hub is not None:
        return HubSource(data.hub, data.config, data.revision)
    files = data.files or {}
    return SplitFiles(
        str(path),
        {
            split: path.parent / local_path(file, "data.files", DataError)
            for split, file in files.items()
        },
    )


@dataclass(frozen=True)
class _Choices:
    """A row's choices, and which one is right."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int


class _TaskForm:
    """Puts the rows of a task into words."""

    def __init__(self, path: Path, config: TaskConfig):
        self._path = path
        self._config = config
        self._templates = {
            scoring: compile_template(source, f"{path}: template {scoring}")
            for scoring, source in config.template.items()
        }
        self._texts = self._list_reader("choices", config.choices)
        self._labels = None if config.labels is None else self._list_reader("labels", config.labels)
        self._answer = self._reader("answer", config.answer)

    def ask(self, row: Row, scoring: Scoring) -> ChoiceForm:
        """Make the row's question."""
        if scoring not in self._templates:
            raise ConfigError(
                f"{self._path}: template must have one for scoring {scoring}, it has "
                f"{', '.join(self._templates)} alone; add it, or score by {self._config.scoring}"
            )
        choices = self._read_choices(row)
        prompt = _fill_in(self._templates[scoring], row, f"template {scoring}", choices)
        answers = choices.labels if scoring == "label" else choices.texts
        per_character = scoring == "text" and self._config.normalization == "characters"
        return ChoiceForm(
            contexts=(prompt,) * len(answers),
            continuations=tuple(self._config.delimiter + answer for answer in answers),
            normalizers=tuple(
                float(max(len(answer), 1)) if per_character else 1.0 for answer in answers
            ),
            labels=choices.labels,
            gold=choices.gold,
            group=self._read_group(row),
        )

    def _read_choices(self, row: Row) -> _Choices:
        texts = self._texts(row)
        if len(texts) < 2:
            row.reject(f"choices must be at least 2, got {len(texts)}")
        labels = self._labels(row) if self._labels else _letters(row, len(texts))
        if len(labels) != len(texts):
            row.reject(f"must have as many labels as choices, got {len(labels)} and {len(texts)}")
        if len(set(labels)) < len(labels):
            row.reject(f"labels must differ, got {', '.join(labels)}")
        return _Choices(texts, labels, self._read_gold(row, texts, labels))

    def _read_gold(self, row: Row, texts: tuple[str, ...], labels: tuple[str, ...]) -> int:
        answer = _as_text(row, "answer", self._answer(row)).strip()
        match self._config.answer_is:
            case "index":
                options = tuple(map(str, range(len(texts))))
            case "text":
                options = tuple(text.strip() for text in texts)
            case _:
                options = labels
        if answer not in options:
            row.reject(
                f"answer ({self._config.answer}) must be a choice's {self._config.answer_is}, one "
                f"of {', '.join(options)}, got {shown(answer)}"
            )
        return options.index(answer)

    def _read_group(self, row: Row) -> str | None:
        group = self._config.group
        return None if group is None else _as_text(row, "group", _find(row, group))

    def _list_reader(
        self, setting: str, value: str | tuple[str, ...]
    ) -> Callable[[Row], tuple[str, ...]]:
        if isinstance(value, str):
            return lambda row: _as_texts(row, value, _find(row, value))
        readers = [self._template_reader(setting, source) for source in value]
        return lambda row: tuple(read(row) for read in readers)

    def _reader(self, setting: str, value: str) -> Reader:
        if "{{" in value or "{%" in value:
            return self._template_reader(setting, value)
        return lambda row: _find(row, value)

    def _template_reader(self, setting: str, source: str) -> Reader:
        template = compile_template(source, f"{self._path}: {setting}")
        return lambda row: _fill_in(template, row, setting)


def _fill_in(template: Template, row: Row, setting: str, choices: _Choices | None = None) -> str:
    beside = {}
    if choices is not None:
        beside = {"choice_texts": choices.texts, "choice_labels": choices.labels}
    try:
        return render(template, {**row, **beside})
    except TemplateError as error:
        row.reject(
            f"{setting} can't be filled in: {error}; the row's fields are "
            f"{', '.join(row) or 'none'}"
        )


def _find(row: Row, path: str) -> Any:
    """A field, perhaps inside another; inside a list, that of each entry."""
    value: Any = row
    for part in path.split("."):
        value = _step(row, value, part, path)
    return value


def _step(row: Row, value: Any, part: str, path: str) -> Any:
    if isinstance(value, list):
        return [_step(row, entry, part, path) for entry in value]
    if not isinstance(value, Mapping) or part not in value:
        fields = ", ".join(value) if isinstance(value, Mapping) else "none"
        row.reject(f"the row has no field {path!r}; the fields there are {fields or 'none'}")
    return value[part]


def _as_texts(row: Row, field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        row.reject(f"field {field!r} must be a list, got {shown(value)}")
    return tuple(_as_text(row, f"field {field!r}", entry) for entry in value)


def _as_text(row: Row, what: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        row.reject(f"{what} must be a text or a number, got {shown(value)}")
    return str(value)


def _letters(row: Row, count: int) -> tuple[str, ...]:
    if count > _MAX_LETTERS:
        row.reject(f"{count} choices are more than there are letters; give labels")
    return letters(count)
