"""A run as one HTML page: results, learning curves, and where mixtures send their tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2

import loraloom
from loraloom.errors import DataError
from loraloom.eval.results import (
    AdapterRouting,
    Environment,
    Evaluation,
    TaskResult,
    TaskRouting,
    read_evaluation,
)
from loraloom.report.charts import interval_chart, job_styles, learning_curves
from loraloom.report.jobs import Job, read_runs

# Where a cell's color changes: the load as a multiple of an even share.
LEVELS = (0.01, 0.33, 0.67, 1.5, 3.0)

# What comes of files that are damaged.
_BAD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError)

_CLASSES = {"topics": "topic", "token_classes": "kind of token"}


def make_page(
    runs: Sequence[Path], evaluations: Sequence[Path] = (), now: datetime | None = None
) -> str:
    jobs = read_runs(runs)
    read = {path.name: read_evaluation(path) for path in evaluations}
    try:
        return _render(jobs, read, now or datetime.now(UTC))
    except _BAD as error:
        files = ", ".join(map(str, [*runs, *evaluations]))
        raise DataError(f"the tables in {files} are not whole: {error}") from error


def _render(jobs: Sequence[Job], read: Mapping[str, Evaluation], now: datetime) -> str:
    results = [_lay_out(name, content) for name, content in read.items()]
    trained = [job.result for job in jobs if job.result is not None]
    made_with = [*(job.environment for job in jobs), *read.values()]
    content = {
        "title": ", ".join(dict.fromkeys(job.run for job in jobs)),
        "jobs": jobs,
        "facts": _facts(jobs, read.values(), made_with),
        "commands": _different(one.command for one in made_with),
        "warnings": _warnings(jobs, read),
        "metrics": list(dict.fromkeys(name for one in trained for name in one.get("metrics", ()))),
        "styles": job_styles(jobs),
        "charts": learning_curves(jobs),
        "results": results,
        "levels": LEVELS,
        "made": _date(now),
        "version": loraloom.__version__,
    }
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
    return environment.get_template("page.html.j2").render(content)


def _facts(
    jobs: Sequence[Job], contents: Iterable[Evaluation], made_with: Sequence[Environment]
) -> dict[str, str]:
    contents = list(contents)
    ended = [job.ended for job in jobs if job.ended is not None]
    models = [job.result["base_model"] for job in jobs if job.result is not None]
    packages = dict.fromkeys(name for one in made_with for name in one.versions)
    versions = {n: _unique(one.versions.get(n, "") for one in made_with) for n in packages}
    facts = {
        "Base model": _unique([*models, *(content.base_model for content in contents)]),
        "Number format": _unique(one.dtype for one in made_with),
        "Jobs": f"{len(jobs)}",
        "Training ended": _date(max(ended)) if ended else "",
        "Evaluated": _unique(content.date for content in contents),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Device": _unique(one.device for one in made_with),
        "Platform": _unique(one.platform for one in made_with),
    }
    return {name: value for name, value in facts.items() if value}


def _different(values: Iterable[str]) -> list[str]:
    """What is not empty, each once."""
    return list(dict.fromkeys(filter(None, values)))


def _unique(values: Iterable[str]) -> str:
    return "; ".join(_different(values))


def _warnings(jobs: Sequence[Job], read: Mapping[str, Evaluation]) -> list[tuple[str, str]]:
    """Who, and what went wrong."""
    found = []
    for job in jobs:
        if job.result is None:
            found.append((job.label, "has not ended: there is no result.json"))
        else:
            texts = [job.result.get("error"), *job.result.get("warnings", ())]
            found += [(job.label, text) for text in texts if text]
    for file, content in read.items():
        for name, routing in content.routing.items():
            found += [(name, f"{file}: {text}") for text in routing.get("warnings", ())]
    return found


def _lay_out(name: str, content: Evaluation) -> dict[str, Any]:
    """Lay an evaluation out; `tasks` have accuracies, or other figures than `losses`.

    `means` are over several tasks, None without accuracy; `constants` are the accuracies of the
    best constant answers, where they are known.
    """
    found = [pair for by_task in content.results.values() for pair in by_task.items()]
    losses = list(dict.fromkeys(task for task, result in found if "loss" in result))
    tasks = list(dict.fromkeys(task for task, _ in found if task not in losses))
    counted, charts = _counted(tasks, dict(found)), []
    for task in tasks:
        rows = [
            (adapter, accuracy, *_interval_in_words(result))
            for adapter, by_task in content.results.items()
            if (accuracy := (result := by_task.get(task, {})).get("accuracy")) is not None
        ]
        charts += [interval_chart(task, rows)] if rows else []
    means = {adapter: _mean(by_task, counted) for adapter, by_task in content.results.items()}
    return {
        "name": name,
        "content": content,
        "tasks": tasks,
        "losses": losses,
        "charts": charts,
        "means": means if len(counted) > 1 else {},
        "constants": {task: one["majority"] for task, one in found if "majority" in one},
        "mixtures": [lay_out(adapter, routing) for adapter, routing in content.routing.items()],
    }


def _counted(tasks: Sequence[str], results: Mapping[str, TaskResult]) -> list[str]:
    """Tasks of a mean: of a group with an accuracy the group alone, of another one its members."""
    measured = {task for task, one in results.items() if one.get("accuracy") is not None}
    members = {member for task in measured for member in results[task].get("subtasks", ())}
    return [
        task
        for task in tasks
        if task not in members and (task in measured or not results[task].get("subtasks"))
    ]


def _mean(by_task: Mapping[str, TaskResult], tasks: Sequence[str]) -> float | None:
    accuracies = [by_task.get(task, {}).get("accuracy") for task in tasks]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    return math.fsum(known) / len(known) if len(known) == len(tasks) else None


def interval_of(result: TaskResult) -> Sequence[float]:
    """The file's interval, or 1.96 standard errors, or nothing around the accuracy."""
    accuracy, half = result.get("accuracy") or 0.0, 1.96 * (result.get("stderr") or 0.0)
    return result.get("interval", (accuracy - half, accuracy + half))


def _interval_in_words(result: TaskResult) -> tuple[Any, str]:
    low, high = interval_of(result)
    accuracy = result.get("accuracy") or 0.0
    text = f"{100 * accuracy:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
    return (low, high), text


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _visible(token: str) -> str:
    """Show the white space of a token."""
    if token.strip():
        return token.strip() if token.startswith(" ") else token
    return token.translate(str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"}))


def lay_out(name: str, routing: AdapterRouting) -> dict[str, Any]:
    covered = {task: one for task, one in routing["tasks"].items() if one.get("load")}
    told = routing.get("specialisation", {})
    return {
        "name": name,
        "routing": routing,
        "coverage": _coverage([*routing["tasks"].values()]),
        "layers": _layer_rows(routing, [*covered.values()]) if covered else [],
        "specialisation": [_specialisation(told[k], k, routing["layers"]) for k in told],
        "similarity": _similarity(routing, [*covered]),
        "examples": {task: one["example"] for task, one in covered.items() if "example" in one},
        "uniform_bits": math.log2(routing["num_experts"]),
    }


def _coverage(tasks: Sequence[TaskRouting]) -> str:
    covered = sum(task["num_questions_covered"] for task in tasks)
    asked = sum(task["num_questions"] for task in tasks)
    tokens = sum(task["num_tokens"] for task in tasks)
    text = f"{covered:,} of {asked:,} questions, {tokens:,} tokens."
    kept = " The others' scores were kept from before; evaluate with --no-cache to cover them."
    return text + kept if covered < asked else text


def _layer_rows(routing: AdapterRouting, tasks: Sequence[Any]) -> list[dict[str, Any]]:
    """By layer, over all tasks by their tokens: the load, and figures that stand behind it.

    These are effective experts, entropy of the mean probabilities, mean entropy of tokens, in bits.
    """
    weights = [task["num_tokens"] for task in tasks]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(map(operator.mul, weights, values)) / sum(weights)

    def means(key: str, place: int) -> list[float]:
        return [mean(values) for values in zip(*(task[key][place] for task in tasks), strict=True)]

    rows = []
    for place, layer in enumerate(routing["layers"]):
        sizes = routing.get("experts_by_layer")
        load = means("load", place)[: sizes[place] if sizes else None]
        if all("mean_probabilities" in task for task in tasks):
            entropy = math.log2(effective_number(means("mean_probabilities", place)))
        else:  # in files of earlier versions
            entropy = mean([task["mean_entropy_bits"][place] for task in tasks])
        of_tokens = mean([task["token_entropy_bits"][place] for task in tasks])
        figures = [effective_number(load), entropy, of_tokens]
        rows.append({"label": layer, "load": load, "figures": figures})
    return rows


def _specialisation(found: Mapping[str, Any], kind: str, layers: Sequence[Any]) -> dict[str, Any]:
    """By layer the mutual information, and how far each class's load is from that of all.

    `mean` is that distance in the mean, at least a millibit, to compare others with.
    """
    by_layer = list(zip(*found["of"].values(), strict=True))
    return {
        "what": _CLASSES[kind],
        "classes": list(found["of"]),
        "rows": list(zip(layers, found["bits"], by_layer, strict=True)),
        "mean": max(0.001, fmean(value for values in by_layer for value in values)),
    }


def _similarity(routing: AdapterRouting, tasks: Sequence[str]) -> dict[str, list[float | None]]:
    pairs = routing.get("similarity", ())
    known = {frozenset((one["first"], one["second"])): one["mean"] for one in pairs}
    return {a: [known.get(frozenset((a, b))) for b in tasks] for a in tasks if known}


def level(multiple: int | float) -> int:
    """The level of a load, as a multiple of an even share: 0 is unused, 3 about even, 5 most."""
    return sum(multiple >= bound for bound in LEVELS)


def effective_number(load: Sequence[float]) -> float:
    """Compute exp of the load's entropy, as `loraloom.routing.tally` does on tensors."""
    return math.exp(-math.fsum(share * math.log(share) for share in load if share > 0))
