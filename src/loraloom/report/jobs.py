"""What `loraloom train` wrote: each job's result.json and metrics.jsonl, as JSON has them."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraloom.config.run_files import METRICS_FILE, RESULT_FILE, SWEEP_TABLE
from loraloom.config.text import parse_json, read_json, read_text
from loraloom.errors import ConfigError, DataError
from loraloom.eval.results import Fields


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
    repeated = sorted(label for label, count in counts.items() if count > 1)
    if repeated:
        raise ConfigError(
            f"jobs of all RUN_DIRs must have different names, got {', '.join(repeated)} more than "
            "once; pass each directory once, and give the runs' directories different names"
        )
    return jobs


def read_run(path: Path) -> list[Job]:
    directories = sorted(filter(_is_job, path.iterdir())) if path.is_dir() else []
    if directories:
        drawn = _read_sweep(path / SWEEP_TABLE)
        ranks = {name: rank for rank, name in enumerate(drawn)}
        jobs = [_read_job(directory, path.resolve().name) for directory in directories]
        jobs = [replace(job, drawn=drawn.get(job.name, {})) for job in jobs]
        return sorted(jobs, key=lambda job: ranks.get(job.name, -1))
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
    name = directory.resolve().name
    result_file = directory / RESULT_FILE
    result = read_json(result_file, DataError) if result_file.is_file() else None
    file = directory / METRICS_FILE
    *texts, last = read_text(file, DataError).split("\n") if file.is_file() else [""]
    lines = []
    for number, text in enumerate(texts, start=1):
        lines.append(parse_json(text or "{}", f"{file}, line {number}", DataError))
    with suppress(DataError):
        lines.append(parse_json(last, str(file), DataError))
    metrics = [line for line in lines if isinstance(line, dict) and "step" in line]
    return Job(name, run, metrics, result, name)
