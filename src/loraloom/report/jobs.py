"""What `loraloom train` wrote: each job's result.json and metrics.jsonl, as JSON has them."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    drawn: Mapping[str, str]
    """A sweep's job: its rank, and the settings that the sweep varies."""


def read_runs(paths: Sequence[Path]) -> list[Job]:
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
    if _is_job(path):
        return [_read_job(path, path.absolute().parent.resolve().name, {})]
    directories = sorted(filter(_is_job, path.iterdir())) if path.is_dir() else []
    if not directories:
        raise ConfigError(
            f"RUN_DIR must be a directory that `loraloom train` wrote, got {path}, where no "
            f"directory of a job has {METRICS_FILE} or {RESULT_FILE}; pass the run's output_dir"
        )
    drawn = _read_sweep(path / SWEEP_TABLE)
    ranks = {name: rank for rank, name in enumerate(drawn)}
    jobs = [_read_job(directory, path.resolve().name, drawn) for directory in directories]
    return sorted(jobs, key=lambda job: ranks.get(job.name, -1))


def _read_sweep(file: Path) -> dict[str, dict[str, str]]:
    """By job, its rank and varied settings: the columns between its steps and the metric."""
    drawn = {}
    if file.is_file():
        for line in csv.DictReader(read_text(file, DataError).splitlines()):
            varied = list(line)[4:-1]
            drawn[line["name"]] = {name: line[name] for name in ["rank", *varied]}
    return drawn


def _is_job(path: Path) -> bool:
    has_file = (path / METRICS_FILE).is_file() or (path / RESULT_FILE).is_file()
    return has_file and not path.name.startswith(".")


def _read_job(directory: Path, run: str, drawn: Mapping[str, Mapping[str, str]]) -> Job:
    name = directory.resolve().name
    metrics = _read_metrics(directory / METRICS_FILE)
    result_file = directory / RESULT_FILE
    result = read_json(result_file, DataError) if result_file.is_file() else None
    return Job(name, run, metrics, result, label=name, drawn=drawn.get(name, {}))


def _read_metrics(file: Path) -> list[Fields]:
    """Read lines of JSON; the last is passed over while it is being written."""
    if not file.is_file():
        return []
    metrics = []
    lines = read_text(file, DataError).split("\n")
    for number, text in enumerate(lines, start=1):
        try:
            metrics.append(parse_json(text, f"{file}, line {number}", DataError))
        except DataError:
            if number < len(lines):
                raise
    return metrics
