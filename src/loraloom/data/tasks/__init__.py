"""Choice tasks: YAML files say how a row is asked and scored; the built-in ones are beside this.

`label`: the choices are lettered, as in MoE-PEFT `moe_peft/tasks/qa_tasks.py` (Li et al. 2024,
MixLoRA, arXiv:2404.15159). `text`: the answer is a choice's own text, as in lm-eval 0.4.13.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial, reduce
from pathlib import Path
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any, get_args

from loraloom.config.data import Scoring, check_task, is_task_file, skills_lands
from loraloom.config.fields import check_name
from loraloom.config.task import TaskConfig, load_task_config
from loraloom.config.text import local_path
from loraloom.data import sources
from loraloom.data.skills import generate_skills, land_names
from loraloom.data.sources import HubSource, Row, fields_of
from loraloom.data.templates import compile_template, fill_in
from loraloom.data.tokens import TextPair
from loraloom.errors import ConfigError, DataError, shown

# Makes the rows of a split.
Generator = Callable[[str], list[dict[str, Any]]]


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question whose answer is the choice with the highest log-likelihood over its normalizer."""

    task: str
    index: int
    contexts: tuple[str, ...]  # of each choice, as are continuations and normalizers
    continuations: tuple[str, ...]  # with their leading delimiters
    labels: tuple[str, ...]
    gold: int
    normalizers: tuple[float, ...]  # 1 compares sums, the number of characters averages
    group: str | None = None


@dataclass(frozen=True)
class QuestionSet:
    """Questions of a task's split; `source` says for results where they came from."""

    task: str
    split: str
    scoring: Scoring
    questions: list[ChoiceQuestion]
    source: dict[str, Any]


def load_question_set(
    task: str,
    scoring: Scoring | None = None,
    split: str | None = None,
    path: str | Path | None = None,
    limit: int | None = None,
) -> QuestionSet:
    choice_task = find_task(task)
    config = choice_task.config
    split = split or config.evaluation_split
    scoring = scoring or config.scoring
    rows = choice_task.load_rows(split, path)[:limit]
    source = sources.describe(choice_task.find_data(split, path))
    if is_task_file(task):
        source |= {"task_file": task, "task_file_sha256": sources.sha256(Path(task))}
    questions = [choice_task.question(row, index, scoring) for index, row in enumerate(rows)]
    return QuestionSet(choice_task.name, split, scoring, questions, source)


def questions_digest(questions: list[ChoiceQuestion]) -> str:
    text = json.dumps([asdict(question) for question in questions], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def find_task(name: str) -> ChoiceTask:
    if is_task_file(name):
        return _load_task(local_path(name, "a task's file"))
    numbers = skills_lands(name)
    if numbers is None:
        return _built_in(check_task(name))
    lands: Sequence[str | None] = (None,)
    if numbers["num_lands"] is not None:
        lands = land_names(numbers["num_lands"])
    if numbers["land"] is not None:
        lands = [lands[numbers["land"] - 1]]
    return replace(_built_in("skills"), name=name, source=partial(generate_skills, lands=lands))


@lru_cache
def _built_in(name: str) -> ChoiceTask:
    return _load_task(Path(__file__).parent / f"{name}.yaml")


def _load_task(path: Path) -> ChoiceTask:
    config = load_task_config(path)
    try:
        name = check_name(path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    data = config.data
    source = None
    if data is not None and data.hub is not None:
        source = HubSource(data.hub, data.config, data.revision)
    elif data is not None:
        source = {}
        for split, file in (data.files or {}).items():
            source[split] = path.parent / local_path(file, "data.files", DataError)
    return ChoiceTask(name, path, config, source)


@dataclass(frozen=True)
class ChoiceTask:
    """A data set of choice questions and how its rows are asked."""

    name: str
    path: Path
    config: TaskConfig
    source: HubSource | Mapping[str, Path] | Generator | None  # None: a path must be given

    @cached_property
    def _asked(self) -> Mapping[Scoring, TaskConfig]:
        names = get_args(Scoring)
        return {name: self.config.asked_by(name, f"{self.path}: {name}: ") for name in names}

    def load_rows(self, split: str, path: str | Path | None = None) -> list[Row]:
        data = self.find_data(split, path)
        if isinstance(data, Path | HubSource):
            return sources.read_rows(data, split)
        rows = enumerate(data(split), start=1)
        return [Row(fields, f"{self.name}, {split}, row {number}") for number, fields in rows]

    def find_data(self, split: str, path: str | Path | None = None) -> Path | HubSource | Generator:
        source = self.source
        if path is not None and callable(source):
            raise DataError(f"{self.name} does not support path, got {path}; remove path")
        if path is not None:
            return sources.find_named(Path(path), self.name, split)
        if source is None:
            raise DataError(f"{self.name} contains no data; set path")
        if isinstance(source, Mapping):
            return sources.find_split(source, split, self.path)
        return source

    def question(self, row: Row, index: int, scoring: Scoring) -> ChoiceQuestion:
        config = self._asked[scoring]
        if scoring not in config.template:
            raise ConfigError(
                f"{self.path}: template has no entry for scoring {scoring}, only "
                f"{', '.join(config.template)}; add the entry, or set scoring: {config.scoring}"
            )
        prompt = config.template[scoring]
        texts, labels = self._choices(row, config)
        variables: dict[str, Any] = {"choice_texts": texts, "choice_labels": labels}
        if config.continuation is None:
            answers = labels if scoring == "label" else texts
            contexts = [self._fill_in(row, "template", prompt, variables)] * len(texts)
        else:
            continuation = self._fill_in(row, "continuation", config.continuation, variables)
            if not continuation.strip():
                row.reject("the continuation is empty; fill in the row")
            answers = [continuation] * len(texts)
            contexts = []
            for text in texts:
                variables["choice"] = text
                contexts.append(self._fill_in(row, "template", prompt, variables))
        normalizers = [1.0] * len(answers)
        if scoring != "label" and config.normalization == "characters":
            normalizers = [float(max(len(answer), 1)) for answer in answers]
        group = None if config.group is None else _find(row, config.group)
        if group is not None:
            group = _as_text(row, "group", group)
        return ChoiceQuestion(
            self.name,
            index,
            tuple(contexts),
            continuations=tuple(config.delimiter + answer for answer in answers),
            labels=labels,
            gold=self._gold(row, config, texts, labels),
            normalizers=tuple(normalizers),
            group=group or None,
        )

    def training_texts(
        self, row: Row, index: int, scoring: Scoring | None
    ) -> tuple[TextPair, TextPair]:
        """Prompt and completion of the right answer, and of a wrong one: these take turns."""
        question = self.question(row, index, scoring or self.config.scoring)
        texts = list(zip(question.contexts, question.continuations, strict=True))
        right = texts.pop(question.gold)
        return right, texts[index % len(texts)]

    def _choices(self, row: Row, config: TaskConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
        values = self._read(row, "choices", config.choices)
        texts = _as_texts(row, config.choices, values)
        labels = tuple(ascii_uppercase[: len(texts)])
        if config.labels is not None:
            values = self._read(row, "labels", config.labels)
            labels = _as_texts(row, config.labels, values)
        if not 2 <= len(texts) == len(labels) == len(set(labels)):
            expected = (
                "a question must have at least 2 choices, with different labels (from the row if "
                "there are more choices than letters)"
            )
            row.reject(f"{expected}, got {len(texts)} and {', '.join(labels)}", expected)
        return texts, labels

    def _gold(
        self, row: Row, config: TaskConfig, texts: Sequence[str], labels: Sequence[str]
    ) -> int:
        value = self._read(row, "answer", config.answer)
        answer = _as_text(row, "answer", value).strip()
        possible = {"index": range(len(texts)), "text": texts, "label": labels}
        options = [str(option).strip() for option in possible[config.answer_is]]
        if answer not in options:
            expected = f"answer ({config.answer}) must be a choice's {config.answer_is}"
            row.reject(
                f"{expected}, one of {', '.join(options)}, got {shown(answer)}; a split without "
                "published answers can't be used",
                expected,
            )
        if options.count(answer) > 1:
            row.reject(
                f"answer {shown(answer)} must be a single choice's {config.answer_is}, got "
                f"{options.count(answer)} such choices; remove the repeated choice, or set "
                "answer_is: index",
                kind=f"answer must be a single choice's {config.answer_is}",
            )
        return options.index(answer)

    def _read(self, row: Row, setting: str, value: str | Sequence[str]) -> Any:
        if not isinstance(value, str):
            return [self._fill_in(row, setting, source) for source in value]
        is_template = "{{" in value or "{%" in value
        return self._fill_in(row, setting, value) if is_template else _find(row, value)

    def _fill_in(
        self, row: Row, setting: str, source: str, more: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        template = compile_template(source, f"{self.path}: {setting}")
        return fill_in(template, row, setting, more)


def _find(row: Row, path: str) -> Any:
    """A field, perhaps inside another (`choices.text`); inside a list, that of each entry."""

    def step(value: Any, key: str) -> Any:
        if isinstance(value, list):
            return [step(entry, key) for entry in value]
        fields = value if isinstance(value, Mapping) else {}
        if key not in fields:
            missing = f"the row has no field {path!r}"
            row.reject(f"{missing}; the fields there are {fields_of(fields)}", missing)
        return fields[key]

    return reduce(step, path.split("."), row)


def _as_texts(row: Row, name: object, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        expected = f"field {name!r} must be a list"
        row.reject(f"{expected}, got {shown(value)}", expected)
    return tuple(_as_text(row, f"field {name!r}", entry) for entry in value)


def _as_text(row: Row, name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        expected = f"{name} must be a text or a number"
        row.reject(f"{expected}, got {shown(value)}", expected)
    return str(value)
