"""What a job learns from: the `data:` section of a job.

One source, or several in a mix:

    data: {task: arc_easy, path: data/arc_easy}
    data: {mix: [{task: arc_easy, weight: 2}, {dataset: alpaca.jsonl, format: instruction}]}
    data: {dataset: web.jsonl.gz, format: text, streaming: true}
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args

from jinja2 import Environment, TemplateError, meta, nodes
from pydantic import AfterValidator, Field, WithJsonSchema
from typing_extensions import override

from loraloom.config.fields import StrictModel, did_you_mean
from loraloom.errors import ConfigError, shown

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

# Longest row in tokens where nothing else is said, in training and evaluation.
MAX_LENGTH = 512

# What a row of each format is made of: the keys that `fields` may map to columns.
FIELD_ROLES: dict[DataFormat, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output"),
    "chat": ("messages", "prompt", "completion", "tools", "system", "chat_template_kwargs"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs"),
}

# Source of `alpaca`: Taori et al. 2023, Stanford Alpaca, `train.py`.
_PROMPTS = {file.stem: file.read_text("utf-8") for file in Path(__file__).parent.glob("prompts/*")}
PROMPT_TEMPLATES = {name: _PROMPTS[name] for name in ("alpaca", "plain")}
TOOL_TEMPLATE = _PROMPTS["hermes"]  # of ChatML, with tools and calls as Hermes' models write them

_OF_DATASETS = ("config", "format", "template", "chat_template", "fields", "on_empty")
_DATA_FILE = re.compile(r".*\.(json|jsonl|csv|txt|parquet)(\.gz)?", re.IGNORECASE)
_OF_MISSING = ("d", "default", "defined", "undefined")  # filters and tests of Jinja
SHUFFLE_BUFFER = 1000  # rows
MAX_LANDS = 600  # of `skills@N`


def is_task_file(task: str) -> bool:
    return PurePath(task).suffix.lower() in (".yaml", ".yml")


def skills_lands(task: str) -> dict[str, int | None] | None:
    """N and K of `skills@KofN`; K, or both, may be missing. None for another task."""
    numbers = r"((?P<land>\d{1,3})of)?(?P<num_lands>[1-9]\d{0,2})"
    match = re.fullmatch(rf"skills(@{numbers})?", task, re.ASCII)
    if match is None:
        return None
    lands = {name: int(digits) if digits else None for name, digits in match.groupdict().items()}
    if not 1 <= int(match["land"] or 1) <= int(match["num_lands"] or 1) <= MAX_LANDS:
        return None
    return lands


def is_file_of_test(dataset: str | None) -> bool:
    return is_data_file(dataset) and PurePath(str(dataset)).name.split(".")[0] == "test"


def is_data_file(dataset: str | None) -> bool:
    return dataset is not None and _DATA_FILE.fullmatch(dataset) is not None


def task_name(task: str) -> str:
    """What results call a task: the name of a built-in one, the stem of a file."""
    return PurePath(task).stem if is_task_file(task) else task


def default_scoring(fields: Mapping[str, Any]) -> Scoring | None:
    """The scoring where none is given; None: a task file's own, or there is no task."""
    task = fields.get("task")
    return None if task is None or is_task_file(task) else "label"


def is_task(name: str) -> bool:
    return name in get_args(TaskName) or is_task_file(name) or skills_lands(name) is not None


def check_task(task: str) -> str:
    if not is_task(task):
        names = get_args(TaskName)
        raise ConfigError(
            f"task must be one of {', '.join(names)}, skills@N (N up to {MAX_LANDS}), skills@KofN "
            "(its Kth country) or a task's .yaml file, "
            f"got {shown(task)}{did_you_mean(task, names)}"
        )
    return task


# A task's name, or the .yaml file of a task of one's own.
TaskReference = Annotated[
    str,
    AfterValidator(check_task),
    WithJsonSchema({"anyOf": [{"enum": [*get_args(TaskName)]}, {"type": "string"}]}),
]


class PromptForm(StrictModel):
    """Prompt form: how the training data of an adapter wrote prompts."""

    format: Literal["instruction", "chat", "text", "preference", "task"]
    """Format of the data. Prompts of text, preference and task are used as they are."""
    template: str | None = Field(default=None, min_length=1)
    """Instructions: the prompt template, alpaca, plain or a Jinja text."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Conversations: a Jinja text; null for the tokenizer's chat template."""
    system: str | None = None
    """Conversations: the system message that each begins with."""

    @property
    def is_text(self) -> bool:
        """Whether prompts are used as they are."""
        return self.format not in ("instruction", "chat")

    @property
    def prompt_template(self) -> str:
        """The prompt template's text; no file is read for it."""
        return PROMPT_TEMPLATES.get(self.template or "alpaca", self.template or "")

    def as_chat_template(
        self, default: str | Mapping[str, str] | None, *, adds_bos: bool
    ) -> str | None:
        """A chat template that writes prompts so, for engines that know nothing else.

        Args:
            default: The tokenizer's chat template; of several, by their names, `default` counts.
            adds_bos: The tokenizer begins texts with BOS, which chat templates write themselves.
        """
        if self.format == "instruction":
            bos = "{{ bos_token }}" if adds_bos else ""
            written = re.sub(r"\n *", "", _PROMPTS["as_conversation"]).replace("\\n", "\n")
            return bos + written.replace("TEMPLATE", _as_block(self.prompt_template))
        template = default.get("default") if isinstance(default, Mapping) else default
        if self.format == "chat" and self.chat_template is not None:
            template = self.chat_template
        if template is None or self.system is None:
            return template
        text = json.dumps(self.system, ensure_ascii=False)
        return _PROMPTS["with_system"].replace("SYSTEM", text) + template


def _as_block(template: str) -> str:
    jinja = Environment(keep_trailing_newline=True)
    jinja.filters["regex_replace"] = str  # it is parsed only
    try:
        tree = jinja.parse(template)
        names = meta.find_undeclared_variables(tree)
    except TemplateError as error:
        raise ConfigError(f"the adapter's prompt template is not valid Jinja: {error}") from error
    names -= {"instruction", "input"}
    for use in tree.find_all((nodes.Filter, nodes.Test)):
        if use.name == "regex_replace":
            names.add(use.name)
        elif use.name in _OF_MISSING and isinstance(use.node, nodes.Name):
            names.discard(use.node.name)
    if names:
        lacking = ", ".join(sorted(names))
        raise ConfigError(
            f"the adapter's prompt template needs {lacking}, and a chat template has "
            "instruction, input and Jinja's filters alone; remove --apply-chat-template, or "
            "export from Python after `host.adapter(name).prompt = None`"
        )
    return "".join(_keep_spaces(kind, tag) for _, kind, tag in jinja.lex(template))


def _keep_spaces(kind: str, tag: str) -> str:
    # chat templates are compiled with trim_blocks and lstrip_blocks; + keeps the whitespace
    if kind.endswith("_begin") or kind == "raw_end":
        tag = re.sub(r"(\{[%#])(?![-+])", r"\1+", tag)
    return re.sub(r"(?<![-+])([%#]\})", r"+\1", tag) if kind.endswith("_end") else tag


class _SourceFields(StrictModel):
    """One source's settings. What is for tasks is an error with a data set, and the reverse."""

    task: TaskReference | None = None
    """Choice task to train on: a name, or the .yaml file of your own task."""
    dataset: str | None = Field(default=None, min_length=1)
    """Data set to train on: a Hub ID, a directory with a file per split, or a single .json, .jsonl,
    .csv, .txt or .parquet file; all may be gzipped (.gz)."""
    path: str | None = Field(default=None, min_length=1)
    """Task: directory of the task's data, or its parent directory; null: the Hub.
    Relative paths start at the working directory."""
    split: str | None = Field(default=None, min_length=1)
    """Split to read. Default: train, or validation for validation data."""
    scoring: Scoring | None = Field(default_factory=default_scoring)
    """Task: whether the answer is the choice's label or its text. Default: label, or the task
    file's."""
    config: str | None = Field(default=None, min_length=1)
    """Data set on the Hub: name of the configuration."""
    format: DataFormat | None = None
    """Data set: whether rows are instructions, conversations, plain text or preferences."""
    template: str | None = Field(default=None, min_length=1)
    """Instructions, preferences between strings: prompt template, alpaca, plain, a Jinja string or
    a file. Default: alpaca for instructions; preferences' prompts are used as they are."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Conversations: chat template, a Jinja string or file; null: the tokenizer's.
    hermes: ChatML with tools."""
    fields: dict[str, str] | None = None
    """Data set: column of each role, if columns are named differently from the format."""
    on_empty: Literal["error", "skip"] | None = None
    """Data set: whether rows with an empty answer are an error or skipped. Default: error."""

    @override
    def contradictions(self) -> Iterator[str]:
        if self.task is not None and self.dataset is not None:
            yield "dataset and task exclude each other; put two sources into a mix"
            return
        kind = self.format
        unused: dict[str, str] = {}
        if kind in ("instruction", "text"):
            unused["chat_template"] = f"format {kind}"
        if kind in ("chat", "text"):
            unused["template"] = f"format {kind}"
        if self.task is not None:
            unused |= dict.fromkeys(_OF_DATASETS, "a task, only for a dataset")
        if self.dataset is not None:
            unused |= dict.fromkeys(("path", "scoring"), "a dataset, only for a task")
        if is_data_file(self.dataset):
            unused |= dict.fromkeys(("split", "config"), f"a file ({self.dataset})")
        for name, case in unused.items():
            if getattr(self, name) is not None:
                yield f"{name} is not supported for {case}; remove {name}"
        if self.dataset is not None and kind is None:
            yield f"dataset requires format: {', '.join(FIELD_ROLES)}"
        elif kind is not None and self.fields is not None:
            roles = FIELD_ROLES[kind]
            unknown = [repr(role) for role in sorted(self.fields) if role not in roles]
            if unknown:
                yield f"fields must map {', '.join(roles)} to columns, got {', '.join(unknown)}"
            if "messages" in self.fields and {"prompt", "completion"} & self.fields.keys():
                yield "fields must map messages, or prompt and completion, got both"


class SourceConfig(_SourceFields):
    """One source of a mix, or the validation data: a task or a data set."""

    weight: float = Field(default=1.0, gt=0, le=1000)
    """In a mix: number of passes over this source per epoch; 0.5: half of the rows.
    For streams: the source's share of the rows, relative to the others."""
    expert_group: Literal[0, 1] = 0
    """In a mix: group of experts for these rows, if the method has two groups (loramoe)."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.task is None and self.dataset is None:
            yield "a source must be a task or a dataset, got neither"

    @property
    def columns(self) -> dict[str, str]:
        """The column of each role; `input` has none where it would be another role's."""
        fields = self.fields or {}
        columns = {role: fields.get(role, role) for role in FIELD_ROLES[self.format or "text"]}
        if "input" not in fields and "input" in fields.values():
            columns.pop("input", None)
        return columns


class DataConfig(_SourceFields):
    """Training data, one source or a mix of several, and validation data."""

    mix: tuple[SourceConfig, ...] | None = Field(default=None, min_length=1)
    """Several sources to mix."""
    streaming: bool = False
    """Read data sets during training, not all at once before."""
    shuffle_buffer: int | None = Field(
        default_factory=lambda fields: SHUFFLE_BUFFER if fields.get("streaming") else None, ge=1
    )
    """Streaming: number of rows that are read and shuffled at a time. Default: 1000."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the training rows to hold out for `eval/loss`."""
    validation: SourceConfig | None = None
    """Source to measure `eval/loss` on, instead of validation_fraction."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        alone = [name for name in _SourceFields.model_fields if getattr(self, name) is not None]
        if self.mix is not None and alone:
            yield f"mix and {', '.join(alone)} exclude each other; move {alone[0]} into mix"
        if self.task is None and self.dataset is None and self.mix is None:
            yield "data must set task, dataset or mix"
        tasks = [source.task for source in (self, *(self.mix or ())) if source.task]
        if self.streaming and tasks:
            yield f"streaming must be false for tasks, got {tasks[0]}; stream only datasets"
        if self.streaming and self.validation_fraction > 0:
            yield "validation_fraction must be 0 with streaming; set validation instead"
        if self.shuffle_buffer is not None and not self.streaming:
            yield "shuffle_buffer requires streaming; without streaming, all rows are shuffled"
        if self.validation is not None and self.validation_fraction > 0:
            yield "validation and validation_fraction exclude each other; set only one setting"
        weighted = self.validation is not None and self.validation.weight != 1
        grouped = self.validation is not None and self.validation.expert_group != 0
        if weighted or grouped:
            yield "validation does not support weight and expert_group; remove both settings"

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        if self.mix is not None:
            return self.mix
        settings = self.model_dump(include=set(_SourceFields.model_fields))
        return (SourceConfig.model_validate(settings),)

    @property
    def has_validation(self) -> bool:
        return self.validation is not None or self.validation_fraction > 0
