"""What `loraloom train` and `loraloom eval` wrote, as far as a report shows it.

Fields that a report has no use for are passed over, so that files with more of them can be read.
Those that it shows are checked: numbers are finite, tables are whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loraloom.config.json_text import parse_json, read_json, read_text
from loraloom.errors import ConfigError, DataError, shown

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"

Fields = dict[str, Any]
"""What the page shows as it stands in the file."""


Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=-1e39, le=1e39)]
"""As much as float32 holds."""
Positive = Annotated[float, Field(ge=0, le=1e39)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


_Kind = TypeVar("_Kind", bound=_Record)


class _Metrics(_Record):
    model_config = ConfigDict(extra="allow")

    step: Count = 0

    @model_validator(mode="after")
    def _check_numbers(self) -> _Metrics:
        for name, value in (self.model_extra or {}).items():
            if isinstance(value, int | float) and not -1e39 <= value <= 1e39:
                raise ValueError(f"{shown(name)} must be a number that float32 holds, got {value}")
        return self


class Environment(_Record):
    """With what a run was made."""

    versions: dict[str, str] = {}
    platform: str = ""
    device: str = ""
    dtype: str = ""
    command: str = ""


class JobResult(_Record):
    """A job's result.json."""

    status: str
    error: str | None = None
    method: str
    base_model: str
    num_parameters: Count
    steps: Count
    epochs: Positive
    tokens: Count
    weights: str
    metrics: dict[str, Number] = {}
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    peak_memory_bytes: dict[str, Count] = {}
    environment: Environment = Environment()
    warnings: tuple[str, ...] = ()


class TaskResult(_Record):
    """An adapter's accuracy in a task, or its loss on held-out rows; lm-eval's may have neither."""

    accuracy: Share | None = None
    stderr: Positive | None = None
    interval: tuple[Number, Number] | None = None
    num_examples: Count | None = None
    split: str | None = None
    majority: Share | None = None
    subtasks: tuple[str, ...] = ()
    loss: Number | None = None
    perplexity: Positive | None = None
    num_tokens: Count | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the best constant answer is right as often."""
        if self.accuracy is None or self.majority is None:
            return False
        return self.accuracy <= self.majority


class SeedMean(_Record):
    """Accuracies, or held-out losses, of several seeds in a task."""

    mean: Number
    sd: Positive | None = None


class SeedGroup(_Record):
    """Adapters that are seeds of one thing."""

    adapters: tuple[str, ...]
    tasks: dict[str, SeedMean]


class Comparison(_Record):
    """Two contestants on the same questions of a task, or on the same rows held out."""

    task: str
    metric: str = "accuracy"
    first: str
    second: str
    difference: Number
    stderr: Positive | None = None
    interval: tuple[Number, Number]
    num_first_better: Count
    num_second_better: Count
    p_value: Share
    adjusted_p_value: Share


class Example(_Record):
    """A text's tokens, and by router the first choice of each."""

    tokens: tuple[str, ...]
    experts: dict[str, tuple[Count, ...]]

    @model_validator(mode="after")
    def _check_lengths(self) -> Example:
        if any(len(chosen) != len(self.tokens) for chosen in self.experts.values()):
            raise ValueError(f"experts must be one for each of the {len(self.tokens)} tokens")
        return self


class TaskRouting(_Record):
    """A mixture's routing in a task; rows by layer, empty where no question is covered."""

    num_questions: Count
    num_questions_covered: Count
    num_tokens: Count
    load: tuple[tuple[Share, ...], ...] = ()
    mean_probabilities: tuple[tuple[Share, ...], ...] = ()
    mean_entropy_bits: tuple[Positive, ...] = ()
    token_entropy_bits: tuple[Positive, ...] = ()
    example: Example | None = None


class Specialisation(_Record):
    """By layer, what an expert says about the class of a token, and how each class is set apart."""

    bits: tuple[Positive, ...]
    of: dict[str, tuple[Positive, ...]]


class Word(_Record):
    """A token that goes to an expert more than others do."""

    token: str
    count: Count
    share: Positive


class LayerWords(_Record):
    """The typical words of each expert of a layer."""

    layer: Count | str
    experts: tuple[tuple[Word, ...], ...]


class Similarity(_Record):
    """How alike two tasks are."""

    first: str
    second: str
    mean: Number


class AdapterRouting(_Record):
    """A mixture's routing in all tasks."""

    num_experts: int = Field(ge=1, le=1024)
    top_k: Count
    layers: tuple[Count | str, ...]
    experts_by_layer: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    tasks: dict[str, TaskRouting]
    similarity: tuple[Similarity, ...] = ()
    specialisation: dict[Literal["topics", "token_classes"], Specialisation] = {}
    words: tuple[LayerWords, ...] = ()
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_tables(self) -> AdapterRouting:
        if self.experts_by_layer and len(self.experts_by_layer) != len(self.layers):
            raise ValueError("experts_by_layer must have a number for each layer")
        for task, routing in self.tasks.items():
            if routing.load:
                self._check_table(shown(task), routing)
        for kind, told in self.specialisation.items():
            if {len(told.bits), *map(len, told.of.values())} - {len(self.layers)}:
                raise ValueError(f"specialisation by {kind} must have a number for each layer")
        return self

    def _check_table(self, task: str, routing: TaskRouting) -> None:
        rows = {len(routing.load), len(routing.mean_entropy_bits), len(routing.token_entropy_bits)}
        if rows != {len(self.layers)}:
            raise ValueError(f"{task} must have a row for each of {len(self.layers)} layers")
        if {*map(len, (*routing.load, *routing.mean_probabilities))} - {self.num_experts}:
            raise ValueError(f"load of {task} must have {self.num_experts} experts in each row")
        if len(routing.mean_probabilities) not in (0, len(self.layers)):
            raise ValueError(f"mean_probabilities of {task} must have a row for each layer")
        if not routing.num_tokens:
            raise ValueError(f"num_tokens of {task} must be at least 1, got 0")


class EvalFile(Environment):
    """The JSON file of `loraloom eval --output`; its version says what the fields hold."""

    schema_version: Literal[1]
    results: dict[str, dict[str, TaskResult]]
    seeds: dict[str, SeedGroup] = {}
    comparisons: tuple[Comparison, ...] = ()
    routing: dict[str, AdapterRouting] = {}
    base_model: str = ""
    tasks: dict[str, Fields] = {}
    date: str = ""


@dataclass(frozen=True)
class Job:
    """A job of a run.

    Args:
        name: Its name.
        run: Name of its run's directory.
        metrics: Lines of metrics.jsonl.
        result: None while it trains, or where it was interrupted.
        ended: When result.json was written.
        label: What the page calls it: its name, after its run's where there are several.
    """

    name: str
    run: str
    metrics: Sequence[Fields]
    result: JobResult | None
    ended: datetime | None
    label: str


def read_runs(paths: Sequence[Path]) -> list[Job]:
    """Read the jobs of several runs, whose labels differ."""
    jobs = [job for path in paths for job in read_run(path)]
    if len({job.run for job in jobs}) > 1:
        jobs = [replace(job, label=f"{job.run}/{job.name}") for job in jobs]
    twice = sorted(
        label for label, count in Counter(job.label for job in jobs).items() if count > 1
    )
    if twice:
        raise ConfigError(
            f"RUN_DIR must give each job a name of its own, got {', '.join(twice)} more than once; "
            "name each directory once, and let the runs' directories have different names"
        )
    return jobs


def read_run(path: Path) -> list[Job]:
    """Read the jobs of a run, by name."""
    if not path.is_dir():
        raise ConfigError(f"RUN_DIR must be a directory that `loraloom train` wrote, got {path}")
    own = sorted(entry for entry in path.iterdir() if _is_job(entry))
    if own:
        return [_read_job(directory, path.resolve().name) for directory in own]
    if _is_job(path):
        return [_read_job(path, path.absolute().parent.resolve().name)]
    raise ConfigError(
        f"RUN_DIR must be a directory that `loraloom train` wrote, got {path}, where no "
        f"directory of a job has {METRICS_FILE} or {RESULT_FILE}; give the run file's output_dir"
    )


def _is_job(path: Path) -> bool:
    files = (path / METRICS_FILE, path / RESULT_FILE)
    return not path.name.startswith(".") and any(file.is_file() for file in files)


def _read_job(directory: Path, run: str) -> Job:
    file = directory / RESULT_FILE
    has_result = file.is_file()
    name = directory.resolve().name
    return Job(
        name=name,
        label=name,
        run=run,
        metrics=_read_metrics(directory / METRICS_FILE),
        result=_read(file, JobResult, "what `loraloom train` wrote") if has_result else None,
        ended=datetime.fromtimestamp(file.stat().st_mtime, UTC) if has_result else None,
    )


def _read_metrics(file: Path) -> list[Fields]:
    """Read metrics.jsonl; a last line that is being written is passed over."""
    if not file.is_file():
        return []
    *lines, last = read_text(file, DataError).split("\n")
    metrics = [_metrics_of(line, file, number) for number, line in enumerate(lines, start=1)]
    with suppress(DataError):
        metrics.append(_metrics_of(last, file, len(lines) + 1))
    return [line for line in metrics if "step" in line]


def _metrics_of(line: str, file: Path, number: int) -> Fields:
    """Read a line: numbers by name, one of them the step."""
    if not line.strip():
        return {}
    values = parse_json(line, str(file), DataError, number)
    try:
        return _Metrics.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        expected = "must be an object of numbers by name with a step"
        raise DataError(f"{file}, line {number} {expected}: {_first_fault(error)}") from None


def read_evaluation(path: Path) -> EvalFile:
    """Read an evaluation's JSON file."""
    if not path.is_file():
        raise ConfigError(f"--eval must be a file of `loraloom eval --output`, got {path}")
    return _read(path, EvalFile, "what `loraloom eval --output` wrote")


def _read(path: Path, kind: type[_Kind], expected: str) -> _Kind:
    try:
        return kind.model_validate(read_json(path, DataError))
    except ValidationError as error:
        raise DataError(
            f"{path} must be {expected}, got another file: {_first_fault(error)}"
        ) from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return f"{place}: {fault['msg']}" if place else fault["msg"]
