"""What a job learns from: the `data:` section of a job.

One source, or several in a mix:

    data: {task: arc_easy, path: data/arc_easy}
    data: {mix: [{task: arc_easy, weight: 2}, {dataset: alpaca.jsonl, format: instruction}]}
    data: {dataset: web.jsonl.gz, format: text, streaming: true}
"""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from loraloom.config.faults import did_you_mean
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.errors import shown

TaskName = Literal[
    "arc_easy",
    "arc_challenge",
    "boolq",
    "openbookqa",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "skills",
]
Scoring = Literal["label", "text"]
DataFormat = Literal["instruction", "chat", "text", "preference"]

FIELD_ROLES: dict[DataFormat, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output"),
    "chat": ("messages", "tools", "system"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected"),
}
"""What a row of each format is made of: the keys that `fields` may map to columns."""

_NO_TEMPLATE = {
    "chat": "conversations have chat_template, or the tokenizer's",
    "text": "plain text is taken as it is",
    "preference": "prompts are taken as they are, and messages have chat_template",
}
"""Why a format takes no prompt template."""

_ALPACA = """\
Below is an instruction that describes a task\
{% if input %}, paired with an input that provides further context{% endif %}. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

{% if input %}### Input:
{{ input }}

{% endif %}### Response:
"""

_PLAIN = """\
{{ instruction }}
{% if input %}{{ input }}
{% endif %}"""

PROMPT_TEMPLATES = {"alpaca": _ALPACA, "plain": _PLAIN}
"""Source of `alpaca`: Taori et al. 2023, Stanford Alpaca, `train.py`."""

_CONVERSATION_OF_INSTRUCTIONS = (
    "{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'user' %}{% set instruction = ns.system + message['content'] %}"
    "{% set input = '' %}{% set ns.system = '' %}"
    "{% set prompt +%}TEMPLATE{%+ endset %}{{ prompt.rstrip(' ') }}"
    "{% else %}{% set ns.system = ns.system + message['content'] + '\n\n' %}"
    "{% endif %}{% endfor %}"
)
_BEGINNING = (
    "{% if messages[0]['role'] != 'system' %}"
    "{% set messages = [{'role': 'system', 'content': SYSTEM}] + messages %}{% endif %}"
)

_DATA_FILE = re.compile(r".*\.(json|jsonl|csv|txt|parquet)(\.gz)?", re.IGNORECASE)


_TASK_FILE = r"\.ya?ml$"
_SKILLS = r"skills(@[1-9][0-9]{0,2})?"
SHUFFLE_BUFFER = 1000
"""Rows of a stream that are shuffled together, where no other number is given."""

MAX_LANDS = 600
"""Of `skills@N`."""


def is_task_file(task: str) -> bool:
    """Whether a task is named by the YAML file that describes it."""
    return re.search(_TASK_FILE, task, re.IGNORECASE) is not None


def is_skills(task: str) -> bool:
    """Whether a task is `skills`, or `skills@N`: its rules in N lands."""
    return re.fullmatch(_SKILLS, task) is not None


def is_file_of_test(dataset: str | None) -> bool:
    """Whether a data set is a single file that is called `test`, as in a directory of splits."""
    is_file = dataset is not None and _DATA_FILE.fullmatch(dataset) is not None
    return is_file and PurePath(str(dataset)).name.split(".")[0] == "test"


def num_lands(task: str) -> int | None:
    """N of `skills@N`; None for `skills`."""
    number = int(task.partition("@")[2] or 0) or None
    if number is not None and number > MAX_LANDS:
        raise ValueError(f"task must be skills@1 to skills@{MAX_LANDS}, got {task!r}")
    return number


def task_name(task: str) -> str:
    """What results call a task: the name of a built-in one, the stem of a file."""
    return PurePath(task).stem if is_task_file(task) else task


def _check_task(task: str) -> str:
    names = get_args(TaskName)
    if is_skills(task):
        num_lands(task)
    if task in names or is_skills(task) or is_task_file(task):
        return task
    raise ValueError(
        f"task must be one of {', '.join(names)}, or a task's .yaml file, got {task!r}"
        f"{did_you_mean(task, names)}"
    )


TaskReference = Annotated[
    str,
    AfterValidator(_check_task),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": list(get_args(TaskName))},
                {"type": "string", "pattern": f"^{_SKILLS}$"},
                {"type": "string", "pattern": r"\.[yY][aA]?[mM][lL]$"},
            ]
        }
    ),
]
"""A task's name, or the .yaml file of a task of one's own."""


class PromptForm(StrictModel):
    """How an adapter's training data wrote its prompts; a part of the adapter's files."""

    format: Literal["instruction", "chat", "text", "preference", "task"]
    """Format of the data. Prompts of text, preference and task are read as they stand."""
    template: str | None = Field(default=None, min_length=1)
    """Instructions: the prompt template, alpaca, plain or a Jinja text."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Conversations: a Jinja text; null for the tokenizer's chat template."""
    system: str | None = None
    """Conversations: the system message that each begins with."""

    @property
    def is_text(self) -> bool:
        """Whether prompts are read as they stand."""
        return self.format not in ("instruction", "chat")

    @property
    def prompt_template(self) -> str:
        """The prompt template's text; no file is read for it."""
        return PROMPT_TEMPLATES.get(self.template or "alpaca", self.template or "")

    def as_chat_template(self, own: str | None, *, adds_bos: bool) -> str | None:
        """A chat template that writes prompts so, for engines that know nothing else.

        Args:
            own: The tokenizer's chat template.
            adds_bos: The tokenizer begins texts with BOS, which chat templates write themselves.
        """
        if self.format == "instruction":
            # chat templates are compiled with trim_blocks and lstrip_blocks; + keeps the whitespace
            kept = re.sub(r"(\{[%#])(?![-+])", r"\1+", self.prompt_template)
            kept = re.sub(r"(?<![-+])([%#]\})", r"+\1", kept)
            bos = "{{ bos_token }}" if adds_bos else ""
            return bos + _CONVERSATION_OF_INSTRUCTIONS.replace("TEMPLATE", kept)
        template = (self.format == "chat" and self.chat_template) or own
        if template is None or self.system is None:
            return template
        return _BEGINNING.replace("SYSTEM", json.dumps(self.system)) + template

    def describe(self) -> list[str]:
        """The settings that are given, a line each."""
        given = self.model_dump(exclude_none=True)
        return [f"{name.replace('_', ' ')}: {value}" for name, value in given.items()]


def default_scoring(task: str | None) -> Scoring | None:
    """The scoring of a task where none is given; None: a task file's own, or there is no task."""
    return None if task is None or is_task_file(task) else "label"


def check_effect(value: Any, info: CheckInfo) -> Any:
    """Return a setting of a source as it came."""
    reason = None if value is None else _why_without_effect(info)
    if reason is not None:
        raise ValueError(f"{info.field_name} has no effect on {reason}; remove it")
    return value


def _why_without_effect(info: CheckInfo) -> str | None:
    """What the setting would have no effect on; the settings before it are known where right."""
    setting, before = info.field_name, info.data
    task, dataset, data_format = (before.get(name) for name in ("task", "dataset", "format"))
    if setting in ("path", "scoring") and dataset is not None:
        return "a dataset, only on a task"
    if setting == "path" and is_skills(task or ""):
        return "skills, which loraloom generates"
    if (
        setting in ("config", "format", "template", "chat_template", "fields", "on_empty")
        and task
        and "dataset" in before
    ):
        return "a task, only on a dataset"
    if setting in ("split", "config") and dataset and _DATA_FILE.fullmatch(dataset):
        return f"a file ({dataset})"
    if setting == "template" and data_format in _NO_TEMPLATE:
        return f"format {data_format}: {_NO_TEMPLATE[data_format]}"
    if setting == "chat_template" and data_format in ("instruction", "text"):
        return f"format {data_format}, only on chat and preference"
    return None


class _SourceFields(StrictModel):
    """One source's settings. What is for tasks is an error with a data set, and the reverse."""

    task: TaskReference | None = None
    """Choice task to learn from: its name, or the .yaml file of a task of your own."""
    dataset: str | None = Field(default=None, min_length=1)
    """Data set to learn from: a hub id, a directory with a file for each split, or a single file.

    Files are .json, .jsonl, .csv, .txt or .parquet; all may be gzipped (.gz)."""
    path: str | None = Field(default=None, min_length=1)
    """Task: directory that holds its data, or a directory of such directories; None for the hub.

    A relative path starts where the command runs."""
    split: str | None = Field(default=None, min_length=1)
    """Split to read; train by default, validation for validation data."""
    scoring: Scoring | None = Field(default=None, validate_default=True)
    """Task: whether the answer is the choice's label or its own text.

    label by default; a task file has a default of its own."""
    config: str | None = Field(default=None, min_length=1)
    """Data set on the hub: which of its configurations."""
    format: DataFormat | None = Field(default=None, validate_default=True)
    """Data set: whether rows are instructions, conversations, plain text or preferences."""
    template: str | None = Field(default=None, min_length=1)
    """Instructions: the prompt template, alpaca (the default) or plain, a Jinja text or a file."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Conversations: a Jinja text or file in place of the tokenizer's chat template.

    trl takes the template that the trl package has for training with the tokenizer's."""
    fields: dict[str, str] | None = None
    """Data set: column of each role, where they differ from the format's own names."""
    on_empty: Literal["error", "skip"] | None = None
    """Data set: whether rows with an empty answer are an error (the default) or left out."""

    @field_validator("dataset")
    @classmethod
    def _check_one_origin(cls, dataset: str | None, info: CheckInfo) -> str | None:
        if dataset is not None and info.data.get("task") is not None:
            raise ValueError(
                f"dataset and task exclude each other, got {dataset!r} and {info.data['task']!r}; "
                "put two sources into a mix"
            )
        return dataset

    @field_validator(
        *("path", "split", "scoring", "config", "format", "template", "chat_template", "fields"),
        "on_empty",
    )
    @classmethod
    def _check_effect(cls, value: Any, info: CheckInfo) -> Any:
        return check_effect(value, info)

    @field_validator("scoring")
    @classmethod
    def _fill_in_scoring(cls, scoring: Scoring | None, info: CheckInfo) -> Scoring | None:
        return scoring or default_scoring(info.data.get("task"))

    @field_validator("format")
    @classmethod
    def _check_format(cls, data_format: str | None, info: CheckInfo) -> str | None:
        if data_format is None and info.data.get("dataset") is not None:
            raise ValueError(
                "format must be given with a dataset: instruction, chat, text or preference"
            )
        return data_format

    @field_validator("fields")
    @classmethod
    def _check_roles(cls, fields: dict[str, str] | None, info: CheckInfo) -> dict[str, str] | None:
        data_format = info.data.get("format")
        if fields is None or data_format is None:
            return fields
        roles = FIELD_ROLES[data_format]
        unknown = sorted(set(fields) - set(roles))
        if unknown:
            raise ValueError(
                f"fields must map {', '.join(roles)} to column names, got "
                f"{', '.join(map(shown, unknown))}"
            )
        return fields


class SourceConfig(_SourceFields):
    """One source of a mix, or the validation data: a task or a data set."""

    weight: float = Field(default=1.0, gt=0, le=1000)
    """In a mix: how many times an epoch goes through this source's rows; 0.5 is a half of them.

    Of streams: its share of the rows, against the others'."""
    expert_group: Literal[0, 1] = 0
    """In a mix: which half of the experts these rows are meant for, where the method has two groups
    of them (loramoe)."""

    @model_validator(mode="after")
    def _check_origin(self) -> SourceConfig:
        if self.task is None and self.dataset is None:
            raise ValueError("a source must be a task or a dataset, got neither")
        return self


class DataConfig(_SourceFields):
    """What a job learns from: one source, or a mix of several; and what is held out of it."""

    mix: tuple[SourceConfig, ...] | None = Field(default=None, min_length=1)
    """Several sources in place of one."""
    streaming: bool = False
    """Read data sets on and on while training, in place of all at once before it."""
    shuffle_buffer: int | None = Field(default=None, ge=1, le=10_000_000, validate_default=True)
    """Streaming: rows that are read, shuffled and learnt at a time, 1000 by default."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows that is held out to measure `eval/loss`."""
    validation: SourceConfig | None = None
    """A source to measure `eval/loss` on, in place of a share of the training rows."""

    @field_validator("mix")
    @classmethod
    def _check_mix_alone(
        cls, mix: tuple[SourceConfig, ...] | None, info: CheckInfo
    ) -> tuple[SourceConfig, ...] | None:
        beside = [name for name in _SourceFields.model_fields if info.data.get(name) is not None]
        if mix is not None and beside:
            raise ValueError(
                f"mix must stand without {', '.join(beside)}; put them into a source of the mix"
            )
        return mix

    @field_validator("streaming")
    @classmethod
    def _check_streamed(cls, streaming: bool, info: CheckInfo) -> bool:
        sources: tuple[SourceConfig, ...] = info.data.get("mix") or ()
        tasks = [task for task in (info.data.get("task"), *(s.task for s in sources)) if task]
        if streaming and tasks:
            raise ValueError(
                f"streaming must be false for tasks, which are read whole, got {tasks[0]}; stream "
                "datasets alone"
            )
        return streaming

    @field_validator("shuffle_buffer")
    @classmethod
    def _fill_in_buffer(cls, buffer: int | None, info: CheckInfo) -> int | None:
        streaming = info.data.get("streaming", False)
        if buffer is not None and not streaming:
            raise ValueError(
                "shuffle_buffer has no effect without streaming, where all rows are shuffled; "
                "remove it"
            )
        return buffer or (SHUFFLE_BUFFER if streaming else None)

    @field_validator("validation_fraction")
    @classmethod
    def _check_fraction(cls, fraction: float, info: CheckInfo) -> float:
        if fraction > 0 and info.data.get("streaming"):
            raise ValueError(
                "validation_fraction is a share of all rows, which streaming never has; give "
                "validation data of their own"
            )
        return fraction

    @field_validator("validation")
    @classmethod
    def _check_validation(
        cls, validation: SourceConfig | None, info: CheckInfo
    ) -> SourceConfig | None:
        if validation is not None and info.data.get("validation_fraction", 0) > 0:
            raise ValueError("validation and validation_fraction exclude each other; give one")
        for name in ("weight", "expert_group"):
            default = SourceConfig.model_fields[name].default
            if validation is not None and getattr(validation, name) != default:
                raise ValueError(f"validation.{name} has no effect outside a mix; remove it")
        return validation

    @model_validator(mode="after")
    def _check_some_source(self) -> DataConfig:
        if self.task is None and self.dataset is None and self.mix is None:
            raise ValueError("a task, a dataset or a mix must be given, got none of them")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources, whether there is one or a mix."""
        if self.mix is not None:
            return self.mix
        return (
            SourceConfig.model_validate(self.model_dump(include=set(_SourceFields.model_fields))),
        )

    @property
    def has_validation(self) -> bool:
        """Whether rows are held out, so that `eval/loss` is measured."""
        return self.validation is not None or self.validation_fraction > 0
