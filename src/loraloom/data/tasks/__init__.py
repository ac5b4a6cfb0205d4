"""Choice tasks: YAML files say how a row is asked and scored; the built-in ones are beside this.

`label`: the question with its lettered choices, the answer is a label. The prompts are those of the
paper's own code. `text`: the question alone, the answer is the choice's own text. Prompts,
delimiters and normalisation are those of the lm-eval task.

Source: Li et al. 2024, MixLoRA, arXiv:2404.15159, with MoE-PEFT `moe_peft/tasks/qa_tasks.py`;
lm-eval 0.4.13 `lm_eval/tasks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, get_args

from jinja2 import Template, TemplateError

from loraloom.config.data import Scoring, TaskName, is_skills, is_task_file, num_lands, task_name
from loraloom.config.faults import suggestion
from loraloom.config.fields import check_name
from loraloom.config.loading import load_task_config
from loraloom.config.paths import local_path
from loraloom.config.task import TaskConfig, TaskDataConfig
from loraloom.data.examples import ChoiceQuestion
from loraloom.data.files import read_file
from loraloom.data.locations import HubSource, SplitFiles, find_named, read_hub
from loraloom.data.rows import Row
from loraloom.data.skills import generate_skills
from loraloom.data.templates import compile_template, render
from loraloom.errors import ConfigError, DataError, shown

TASK_NAMES = get_args(TaskName)

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Generator = Callable[[str], list[dict[str, Any]]]
"""Makes the rows of a split."""


def find_task(name: str) -> ChoiceTask:
    """The task of that name, or the one that a .yaml file describes."""
    if is_task_file(name):
        return load_task(name)
    if is_skills(name):
        try:
            generate = partial(generate_skills, num_lands=num_lands(name))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return replace(_built_in("skills"), name=name, source=generate)
    if name not in TASK_NAMES:
        raise ConfigError(
            f"{suggestion(name, TASK_NAMES)}task must be one of {', '.join(TASK_NAMES)}, or a "
            f"task's .yaml file, got {name!r}"
        )
    return _built_in(name)


@lru_cache
def _built_in(name: str) -> ChoiceTask:
    return load_task(Path(__file__).parent / f"{name}.yaml")


def load_task(path: str | Path) -> ChoiceTask:
    """The task that a YAML file describes; its name is the file's, without the suffix."""
    config = load_task_config(path)
    try:
        name = check_name(task_name(str(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    task = ChoiceTask(name, Path(path), config, _source(config.data, Path(path)))
    _ = task.forms  # whose templates are compiled
    return task


def _source(data: TaskDataConfig | None, path: Path) -> HubSource | SplitFiles | None:
    if data is None:
        return None
    if data.hub is not None:
        return HubSource(data.hub, data.config, data.revision)
    files = {
        split: path.parent / local_path(file, "data.files", DataError)
        for split, file in (data.files or {}).items()
    }
    return SplitFiles(str(path), files)


@dataclass(frozen=True)
class ChoiceTask:
    """A data set of choice questions and how its rows are asked.

    `name` is the task's name and that of its directory; `source` is the copy on the hub, local
    files, or the function that generates the rows (None: a path must be given).
    """

    name: str
    path: Path
    config: TaskConfig
    source: HubSource | SplitFiles | Generator | None

    @property
    def evaluation_split(self) -> str:
        """The split that is reported."""
        return self.config.evaluation_split

    @property
    def scoring(self) -> Scoring:
        """How it is scored by default."""
        return self.config.scoring

    @cached_property
    def forms(self) -> Mapping[str, _Form]:
        """What puts rows into words, by scoring."""
        return {
            scoring: _Form(self.path, self.config.asked_by(scoring), scoring)
            for scoring in get_args(Scoring)
            if scoring in self.config.template
        }

    def load_rows(self, split: str, path: str | Path | None = None) -> list[Row]:
        """The rows of a split, from a local copy where a path is given, else from the source."""
        data = self.find_data(split, path)
        if isinstance(data, Path):
            return read_file(data)
        if isinstance(data, HubSource):
            return read_hub(data, split)
        return [
            Row(fields, f"{self.name}, {split}, row {number}")
            for number, fields in enumerate(data(split), start=1)
        ]

    def find_data(self, split: str, path: str | Path | None = None) -> Path | HubSource | Generator:
        """Where the rows of a split come from: a file, the hub, or a function."""
        source = self.source
        if path is not None and callable(source):
            raise DataError(f"{self.name} is generated and takes no path, got {path}; leave it out")
        if path is not None:
            return find_named(Path(path), self.name, split)
        if source is None:
            raise DataError(f"{self.name} has no data of its own; give its path")
        return source.find(split) if isinstance(source, SplitFiles) else source

    def question(self, row: Row, index: int, scoring: Scoring) -> ChoiceQuestion:
        """The row, which stands at `index` of its split, as a question."""
        if scoring not in self.forms:
            raise ConfigError(
                f"{self.path}: template must have one for scoring {scoring}, it has "
                f"{', '.join(self.forms)} alone; add it, or score by {self.scoring}"
            )
        return self.forms[scoring].ask(row, self.name, index)

    def training_text(self, row: Row, scoring: Scoring) -> tuple[str, str]:
        """The row as prompt and completion, those of the right answer; errors as `question`."""
        asked = self.question(row, 0, scoring)
        return asked.contexts[asked.gold], asked.continuations[asked.gold]

    def preference_texts(
        self, row: Row, index: int, scoring: Scoring
    ) -> tuple[tuple[str, str], tuple[str, str]]:
        """The row as two prompts and completions: those of the right answer and of a wrong one.

        Which of the wrong ones goes round with the row's place in the split.
        """
        asked = self.question(row, index, scoring)
        wrong = [choice for choice in range(len(asked.contexts)) if choice != asked.gold]
        texts = list(zip(asked.contexts, asked.continuations, strict=True))
        return texts[asked.gold], texts[wrong[index % len(wrong)]]


@dataclass(frozen=True)
class _Choices:
    """A row's choices, and which one is right."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int


class _Form:
    """Puts the rows of a task into words, for one scoring."""

    def __init__(self, path: Path, config: TaskConfig, scoring: Scoring):
        self._path, self._config, self._scoring = path, config, scoring
        self._template = self._compile(f"template {scoring}", config.template[scoring])
        continuation = config.continuation
        self._continuation = continuation and self._compile("continuation", continuation)
        self._texts = self._list_reader("choices", config.choices)
        self._labels = None if config.labels is None else self._list_reader("labels", config.labels)
        self._answer = self._reader("answer", config.answer)

    def ask(self, row: Row, task: str, index: int) -> ChoiceQuestion:
        choices = self._read_choices(row)
        known = {"choice_texts": choices.texts, "choice_labels": choices.labels}
        setting = f"template {self._scoring}"
        answers = choices.labels if self._scoring == "label" else choices.texts
        if isinstance(self._continuation, Template):
            contexts = tuple(
                _fill_in(self._template, row, setting, {**known, "choice": text})
                for text in choices.texts
            )
            rest = _fill_in(self._continuation, row, "continuation", known)
            if not rest.strip():
                row.reject("the continuation is empty, so there is nothing to score; mend the row")
            answers = (rest,) * len(contexts)
        else:
            contexts = (_fill_in(self._template, row, setting, known),) * len(answers)
        per_character = self._scoring == "text" and self._config.normalization == "characters"
        group = self._config.group
        return ChoiceQuestion(
            task=task,
            index=index,
            contexts=contexts,
            continuations=tuple(self._config.delimiter + answer for answer in answers),
            labels=choices.labels,
            gold=choices.gold,
            normalizers=tuple(
                float(max(len(answer), 1)) if per_character else 1.0 for answer in answers
            ),
            group=None if group is None else _as_text(row, "group", _find(row, group)),
        )

    def _read_choices(self, row: Row) -> _Choices:
        texts = self._texts(row)
        if len(texts) < 2:
            row.reject(f"choices must be at least 2, got {len(texts)}")
        if self._labels is None and len(texts) > len(_LETTERS):
            row.reject(f"{len(texts)} choices are more than there are letters; give labels")
        labels = self._labels(row) if self._labels else tuple(_LETTERS[: len(texts)])
        if len(labels) != len(texts):
            row.reject(f"must have as many labels as choices, got {len(labels)} and {len(texts)}")
        if len(set(labels)) < len(labels):
            row.reject(f"labels must differ, got {', '.join(labels)}")
        return _Choices(texts, labels, self._read_gold(row, texts, labels))

    def _read_gold(self, row: Row, texts: Sequence[str], labels: Sequence[str]) -> int:
        answer = _as_text(row, "answer", self._answer(row)).strip()
        options = {
            "index": [str(place) for place in range(len(texts))],
            "text": [text.strip() for text in texts],
            "label": list(labels),
        }[self._config.answer_is]
        if answer not in options:
            row.reject(
                f"answer ({self._config.answer}) must be a choice's {self._config.answer_is}, one "
                f"of {', '.join(options)}, got {shown(answer)}; a split without published answers "
                "can't be used"
            )
        return options.index(answer)

    def _list_reader(
        self, setting: str, value: str | tuple[str, ...]
    ) -> Callable[[Row], tuple[str, ...]]:
        if isinstance(value, str):
            return lambda row: _as_texts(row, value, _find(row, value))
        readers = [self._template_reader(setting, source) for source in value]
        return lambda row: tuple(read(row) for read in readers)

    def _reader(self, setting: str, value: str) -> Callable[[Row], Any]:
        if "{{" in value or "{%" in value:
            return self._template_reader(setting, value)
        return lambda row: _find(row, value)

    def _template_reader(self, setting: str, source: str) -> Callable[[Row], str]:
        template = self._compile(setting, source)
        return lambda row: _fill_in(template, row, setting, {})

    def _compile(self, setting: str, source: str) -> Template:
        return compile_template(source, f"{self._path}: {setting}")


def _fill_in(template: Template, row: Row, setting: str, more: Mapping[str, Any]) -> str:
    try:
        return render(template, {**row, **more})
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
