"""What `loraloom train` and `loraloom eval` wrote, as far as a report shows it.

Fields that a report has no use for are passed over, so that files with more of them can be read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from loraloom.errors import ConfigError, DataError

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"

Fields = dict[str, Any]
"""What the page shows as it stands in the file."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


_Kind = TypeVar("_Kind", bound=_Record)


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
    num_parameters: int
    steps: int
    epochs: float
    tokens: int
    weights: str
    metrics: dict[str, float] = {}
    seconds: float
    peak_memory_bytes: dict[str, int] = {}
    environment: Environment = Environment()
    warnings: tuple[str, ...] = ()


class TaskResult(_Record):
    """An adapter's accuracy in a task, or its loss on held-out rows; lm-eval's may have neither."""

    accuracy: float | None = None
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    num_examples: int | None = None
    split: str | None = None
    majority: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    num_tokens: int | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the best constant answer is right as often."""
        if self.accuracy is None or self.majority is None:
            return False
        return self.accuracy <= self.majority


class Example(_Record):
    """A text's tokens, and by router the first choice of each."""

    tokens: tuple[str, ...]
    experts: dict[str, tuple[int, ...]]


class TaskRouting(_Record):
    """A mixture's routing in a task; rows by layer, empty where no question is covered."""

    num_questions: int
    num_questions_covered: int
    num_tokens: int
    load: tuple[tuple[float, ...], ...] = ()
    mean_entropy_bits: tuple[float, ...] = ()
    token_entropy_bits: tuple[float, ...] = ()
    example: Example | None = None


class AdapterRouting(_Record):
    """A mixture's routing in all tasks."""

    num_experts: int
    top_k: int
    layers: tuple[int | str, ...]
    tasks: dict[str, TaskRouting]
    similarity: tuple[Fields, ...] = ()
    words: tuple[Fields, ...] = ()
    warnings: tuple[str, ...] = ()


class EvalFile(Environment):
    """The JSON file of `loraloom eval --output`; its version says what the fields hold."""

    schema_version: Literal[1]
    results: dict[str, dict[str, TaskResult]]
    seeds: dict[str, Fields] = {}
    comparisons: tuple[Fields, ...] = ()
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
    """Read the jobs of several runs, whose labels differ.

    Args:
        paths: See `read_run`.

    Raises:
        ConfigError: If a path is no run, or two jobs would have one label.
        DataError: If a file can't be used.
    """
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
    """Read the jobs of a run, by name.

    Args:
        path: A run's `output_dir`, or the directory of one job in it.

    Raises:
        ConfigError: If it is no such directory.
        DataError: If a file in it can't be used.
    """
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
    lines = _text(file).split("\n")
    metrics = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line) if line.strip() else {}
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{file}, line {number} must be JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("step", 0), int):
            raise DataError(f"{file}, line {number} must be an object with a step, got {line!r}")
        if "step" in value:
            metrics.append(value)
    return metrics


def read_evaluation(path: Path) -> EvalFile:
    """Read an evaluation's JSON file.

    Raises:
        ConfigError: If there is none.
        DataError: If it is something else, or of a later version.
    """
    if not path.is_file():
        raise ConfigError(f"--eval must be a file of `loraloom eval --output`, got {path}")
    return _read(path, EvalFile, "what `loraloom eval --output` wrote")


def _read(path: Path, kind: type[_Kind], expected: str) -> _Kind:
    try:
        return kind.model_validate_json(_text(path))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise DataError(
            f"{path} must be {expected}, got another file: {f'{place}: ' if place else ''}"
            f"{fault['msg']}"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
