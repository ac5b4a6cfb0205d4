"""What `loraloom train` wrote, as far as a report shows it.

Numbers are finite; fields that a report has no use for are passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from loraloom.config.text import parse_json, read_text
from loraloom.errors import ConfigError, DataError
from loraloom.eval.results import (
    Count,
    Environment,
    Fields,
    Number,
    Record,
    first_fault,
    read_record,
)

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"


class _Metrics(Record):
    """A line of metrics.jsonl: numbers by name, and the names of what has collapsed."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number | str | list[Any] | dict[str, Any] | None]

    step: Count = 0


class JobResult(Record):
    """A job's result.json."""

    status: str
    error: str | None = None
    method: str
    base_model: str
    num_parameters: Count
    steps: Count
    epochs: Number
    tokens: Count
    weights: str
    metrics: dict[str, Number] = Field(default_factory=dict)
    seconds: Annotated[float, Field(ge=0, le=1e10)]
    peak_memory_bytes: dict[str, Count] = Field(default_factory=dict)
    environment: Environment = Environment()
    warnings: tuple[str, ...] = ()


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
    counts = Counter(job.label for job in jobs)
    if twice := sorted(label for label, count in counts.items() if count > 1):
        raise ConfigError(
            f"RUN_DIR must give each job a name of its own, got {', '.join(twice)} more than once; "
            "name each directory once, and let the runs' directories have different names"
        )
    return jobs


def read_run(path: Path) -> list[Job]:
    """Read the jobs of a run, by name."""
    entries = sorted(path.iterdir()) if path.is_dir() else []
    if jobs := list(filter(_is_job, entries)):
        return [_read_job(directory, path.resolve().name) for directory in jobs]
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
    file, name, result, ended = directory / RESULT_FILE, directory.resolve().name, None, None
    if file.is_file():
        result = read_record(file, JobResult, "what `loraloom train` wrote")
        ended = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return Job(name, run, _read_metrics(directory / METRICS_FILE), result, ended, name)


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
    if not line.strip():
        return {}
    values = parse_json(line, str(file), DataError, number)
    try:
        return _Metrics.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        expected = "must be an object of numbers by name with a step"
        raise DataError(f"{file}, line {number} {expected}: {first_fault(error)}") from None
