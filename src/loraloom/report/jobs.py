"""What `loraloom train` wrote: each job's result.json and metrics.jsonl, as JSON has them."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraloom.config.text import parse_json, read_json, read_text
from loraloom.errors import ConfigError, DataError
from loraloom.eval.results import Fields

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
SWEEP_TABLE = "sweep.csv"


@dataclass(frozen=True)
class Job:
    """A job of a run; it has no result while it trains, or where it was interrupted."""

    name: str
    run: str
    metrics: Sequence[Fields]
    result: Fields | None
    label: str
    """What the page calls it: its name, after its run's where there are several."""
    drawn: Mapping[str, str] = field(default_factory=dict)
    """A sweep's job: its rank, and the settings that the sweep varies."""


def read_runs(paths: Sequence[Path]) -> list[Job]:
    """Read the jobs of several runs, whose labels differ."""
    jobs = [job for path in paths for job in read_run(path)]
    if len({job.run for job in jobs}) > 1:
        jobs = [replace(job, label=f"{job.run}/{job.name}") for job in jobs]
    counts = Counter(job.label for job in jobs)
    if twice := sorted(label for label, count in counts.items() if count > 1):
        raise ConfigError(
            f"jobs of all RUN_DIRs must have different names, got {', '.join(twice)} more than "
            "once; pass each directory once, and give the runs' directories different names"
        )
    return jobs


def read_run(path: Path) -> list[Job]:
    if jobs := list(filter(_is_job, sorted(path.iterdir()) if path.is_dir() else [])):
        drawn = _read_sweep(path / SWEEP_TABLE)
        read = [_read_job(directory, path.resolve().name) for directory in jobs]
        read = [replace(job, drawn=drawn.get(job.name, {})) for job in read]
        places = {name: place for place, name in enumerate(drawn)}
        return sorted(read, key=lambda job: places.get(job.name, -1))
    if _is_job(path):
        return [_read_job(path, path.absolute().parent.resolve().name)]
    raise ConfigError(
        f"RUN_DIR must be a directory that `loraloom train` wrote, got {path}, where no "
        f"directory of a job has {METRICS_FILE} or {RESULT_FILE}; pass the run's output_dir"
    )


def _read_sweep(file: Path) -> dict[str, dict[str, str]]:
    """By job, its rank and varied settings: the columns between its steps and the metric."""
    lines = csv.DictReader(read_text(file, DataError).splitlines() if file.is_file() else [])
    varied = list(lines.fieldnames or ())[4:-1]
    return {line["name"]: {name: line[name] for name in ("rank", *varied)} for line in lines}


def _is_job(path: Path) -> bool:
    files = (path / METRICS_FILE, path / RESULT_FILE)
    return not path.name.startswith(".") and any(file.is_file() for file in files)


def _read_job(directory: Path, run: str) -> Job:
    """Read a job's two files; a last line of metrics that is being written is passed over."""
    file, name = directory / RESULT_FILE, directory.resolve().name
    result = read_json(file, DataError) if file.is_file() else None
    file = directory / METRICS_FILE
    *lines, last = read_text(file, DataError).split("\n") if file.is_file() else [""]
    numbered = enumerate(lines, start=1)
    metrics = [parse_json(line or "{}", f"{file}, line {n}", DataError) for n, line in numbered]
    with suppress(DataError):
        metrics.append(parse_json(last, str(file), DataError))
    metrics = [line for line in metrics if isinstance(line, dict) and "step" in line]
    return Job(name, run, metrics, result, name)
