"""The page: what files hold, laid out and put into the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jinja2

import loraloom
from loraloom.errors import DataError
from loraloom.eval.results import Environment, EvaluationFile, TaskResult, read_evaluation
from loraloom.report.charts import Chart, interval_chart
from loraloom.report.curves import job_styles, learning_curves
from loraloom.report.files import Job, read_runs
from loraloom.report.routing import LEVELS, Mixture, lay_out, level


@dataclass(frozen=True)
class Results:
    """An evaluation, laid out.

    Args:
        name: Of its file.
        content: What the file says.
        tasks: Names of those with accuracies, or other figures than losses, in the file's order.
        losses: Names of data sets with a held-out loss.
        charts: A chart for each task.
        means: Each adapter's mean accuracy, where there are several tasks; None without accuracy.
        constants: Accuracy of the best constant answer to each task, where it is known.
        mixtures: Where their tokens went.
    """

    name: str
    content: EvaluationFile
    tasks: Sequence[str]
    losses: Sequence[str]
    charts: Sequence[Chart]
    means: Mapping[str, float | None]
    constants: Mapping[str, float]
    mixtures: Sequence[Mixture]


def make_page(
    runs: Sequence[Path], evaluations: Sequence[Path] = (), now: datetime | None = None
) -> str:
    """Make the report of one or several runs."""
    jobs = read_runs(runs)
    read = {path.name: read_evaluation(path) for path in evaluations}
    try:
        return _render(jobs, read, now or datetime.now(UTC))
    except (LookupError, TypeError, ValueError, ArithmeticError, jinja2.UndefinedError) as error:
        files = ", ".join(map(str, evaluations))
        raise DataError(f"--eval got {files}, whose tables are not whole: {error}") from error


def _render(jobs: Sequence[Job], read: Mapping[str, EvaluationFile], now: datetime) -> str:
    results = [_lay_out(name, content) for name, content in read.items()]
    content = {
        "title": ", ".join(dict.fromkeys(job.run for job in jobs)),
        "jobs": jobs,
        "facts": _facts(jobs, results),
        "commands": _different([one.command for one in _environments(jobs, results)]),
        "warnings": _warnings(jobs, results),
        "metrics": _metric_names(jobs),
        "styles": job_styles(jobs),
        "charts": learning_curves(jobs),
        "results": results,
        "levels": LEVELS,
        "made": _date(now),
        "version": loraloom.__version__,
    }
    return _templates().get_template("page.html.j2").render(content)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loraloom.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda value: f"{100 * value:.1f}",
        "points": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        "nats": lambda value: f"{value:.4f}",
        "nats_more": lambda value: f"{value:+.4f}".replace("-", "−"),
        "p_value": lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}",
        "millions": lambda value: f"{value / 1e6:.2f} M" if value >= 1e4 else f"{value:,}",
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))),
        "level": level,
        "gib": lambda value: f"{value / 2**30:.2f} GiB",
        "word": _visible,
        "interval": interval_of,
    }
    return environment


def _facts(jobs: Sequence[Job], results: Sequence[Results]) -> dict[str, str]:
    """What the header says."""
    trained = [job.result for job in jobs if job.result is not None]
    contents = [one.content for one in results]
    made_with = _environments(jobs, results)
    ended = [job.ended for job in jobs if job.ended is not None]
    facts = {
        "Base model": _unique([one.base_model for one in [*trained, *contents]]),
        "Number format": _unique([one.dtype for one in made_with]),
        "Jobs": f"{len(jobs)}",
        "Training ended": _date(max(ended)) if ended else "",
        "Evaluated": _unique([content.date for content in contents]),
        "Versions": _join([one.versions for one in made_with]),
        "Device": _unique([one.device for one in made_with]),
        "Platform": _unique([one.platform for one in made_with]),
    }
    return {name: value for name, value in facts.items() if value}


def _environments(jobs: Sequence[Job], results: Sequence[Results]) -> list[Environment]:
    trained = [job.result.environment for job in jobs if job.result is not None]
    return [*trained, *(one.content for one in results)]


def _different(values: Sequence[str]) -> list[str]:
    """What is not empty, each once."""
    return list(dict.fromkeys(filter(None, values)))


def _unique(values: Sequence[str]) -> str:
    return "; ".join(_different(values))


def _join(versions: Sequence[Mapping[str, str]]) -> str:
    """Name each package once, with every version of it."""
    names = dict.fromkeys(name for one in versions for name in one)
    found = {name: _unique([one.get(name, "") for one in versions]) for name in names}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _warnings(jobs: Sequence[Job], results: Sequence[Results]) -> list[tuple[str, str]]:
    """Who, and what went wrong."""
    found = []
    for job in jobs:
        if job.result is None:
            found.append((job.label, "has not ended: there is no result.json"))
        else:
            texts = filter(None, [job.result.error, *job.result.warnings])
            found += [(job.label, text) for text in texts]
    for one in results:
        found += [
            (m.name, f"{one.name}: {text}") for m in one.mixtures for text in m.routing.warnings
        ]
    return found


def _metric_names(jobs: Sequence[Job]) -> list[str]:
    """Columns of the table of jobs, for what some of them measured."""
    names = (name for job in jobs if job.result is not None for name in job.result.metrics)
    return list(dict.fromkeys(names))


def _lay_out(name: str, content: EvaluationFile) -> Results:
    found = [pair for by_task in content.results.values() for pair in by_task.items()]
    losses = list(dict.fromkeys(task for task, result in found if result.loss is not None))
    tasks = list(dict.fromkeys(task for task, _ in found if task not in losses))
    charts = [_interval_chart(task, content.results) for task in tasks]
    counted = _counted(tasks, dict(found))
    return Results(
        name=name,
        content=content,
        tasks=tasks,
        losses=losses,
        charts=[chart for chart in charts if chart is not None],
        means={name: _mean(by_task, counted) for name, by_task in content.results.items()}
        if len(counted) > 1
        else {},
        constants={task: result.majority for task, result in found if result.majority is not None},
        mixtures=[lay_out(name, routing) for name, routing in content.routing.items()],
    )


def _counted(tasks: Sequence[str], results: Mapping[str, TaskResult]) -> list[str]:
    """Tasks of a mean: of a group with an accuracy the group alone, of another one its members."""
    members = {
        member
        for result in results.values()
        if result.accuracy is not None
        for member in result.subtasks
    }
    return [
        task
        for task in tasks
        if task not in members and not (results[task].subtasks and results[task].accuracy is None)
    ]


def _interval_chart(task: str, results: Mapping[str, Mapping[str, TaskResult]]) -> Chart | None:
    rows = [
        (name, result.accuracy, interval_of(result), _in_words(result))
        for name, by_task in results.items()
        if (result := by_task.get(task)) is not None and result.accuracy is not None
    ]
    return interval_chart(task, rows) if rows else None


def interval_of(result: TaskResult) -> tuple[float, float]:
    """The file's interval, or 1.96 standard errors, or nothing around the accuracy."""
    accuracy = result.accuracy or 0.0
    if result.interval is not None:
        return result.interval
    half = 1.96 * (result.stderr or 0.0)
    return accuracy - half, accuracy + half


def _in_words(result: TaskResult) -> str:
    low, high = interval_of(result)
    return f"{100 * (result.accuracy or 0):.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"


def _mean(by_task: Mapping[str, TaskResult], tasks: Sequence[str]) -> float | None:
    accuracies = [by_task[task].accuracy for task in tasks if task in by_task]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return math.fsum(known) / len(known) if len(known) == len(tasks) else None


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _visible(token: str) -> str:
    """Show the white space of a token."""
    if token.strip():
        return token.strip() if token.startswith(" ") else token
    return token.translate(str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"}))
