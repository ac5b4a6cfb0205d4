"""A run as one HTML page: results, learning curves, and where mixtures send their tokens."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np

import loraloom
from loraloom.errors import DataError
from loraloom.eval.results import Evaluation, Fields, read_evaluation
from loraloom.report.charts import interval_chart, job_styles, learning_curves
from loraloom.report.jobs import Job, read_runs

# Where a cell's color changes: the load as a multiple of an even share.
LEVELS = (0.01, 0.33, 0.67, 1.5, 3.0)

# Of a table of results; a longer one is folded.
MAX_ROWS = 20

# What comes of files that are damaged.
_BAD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError)

_CLASSES = {"topics": "topic", "token_classes": "kind of token"}


def make_page(runs: Sequence[Path], evaluations: Sequence[Path] = (), *, summary: str = "") -> str:
    jobs = read_runs(runs)
    differ = len({path.name for path in evaluations}) == len(evaluations)
    read = {path.name if differ else str(path): read_evaluation(path) for path in evaluations}
    try:
        return _render(jobs, read, summary)
    except _BAD as error:
        files = ", ".join(map(str, [*runs, *evaluations]))
        raise DataError(f"{files} are damaged or incomplete: {error}") from error


def _render(jobs: Sequence[Job], read: Mapping[str, Evaluation], summary: str) -> str:
    trained = [job.result for job in jobs if job.result is not None]
    made_with = [*(one.get("environment", {}) for one in trained), *map(dict, read.values())]
    content = {
        "title": ", ".join(dict.fromkeys(job.run for job in jobs)),
        "summary": summary.strip(),
        "jobs": jobs,
        "drawn": list(dict.fromkeys(name for job in jobs for name in job.drawn)),
        "max_rows": MAX_ROWS,
        "facts": _facts(jobs, trained, made_with),
        "commands": list(dict.fromkeys(filter(None, (one.get("command") for one in made_with)))),
        "warnings": _warnings(jobs, read),
        "metrics": list(dict.fromkeys(name for one in trained for name in one.get("metrics", ()))),
        "styles": job_styles(jobs),
        "charts": learning_curves(jobs),
        "results": [_lay_out(name, content) for name, content in read.items()],
        "levels": LEVELS,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
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
        "millions": lambda value: f"{value / 1e6:.2f} M" if value >= 1e4 else f"{value:,}",
        "duration": lambda seconds: str(timedelta(seconds=round(seconds))),
        "level": level,
        "gib": lambda value: f"{value / 2**30:.2f} GiB",
        "rows": lambda table: zip(*(column.cells for column in table.columns), strict=True),
    }
    return environment.get_template("page.html.j2").render(content)


def _facts(
    jobs: Sequence[Job], trained: Sequence[Fields], made_with: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    def unique(name: str, of: Sequence[Mapping[str, Any]] = made_with) -> str:
        return "; ".join(dict.fromkeys(filter(None, (one.get(name) for one in of))))

    versions = [one.get("versions", {}) for one in made_with]
    packages = {name: unique(name, versions) for of in versions for name in of}
    facts = {
        "Base model": unique("base_model", [*trained, *made_with]),
        "Dtype": unique("dtype"),
        "Jobs": f"{len(jobs)}",
        "Evaluated": unique("date"),
        "Versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "Device": unique("device"),
        "Platform": unique("platform"),
    }
    return {name: value for name, value in facts.items() if value}


def _warnings(jobs: Sequence[Job], read: Mapping[str, Evaluation]) -> list[tuple[str, str]]:
    found = []
    for job in jobs:
        if job.result is None:
            found.append((job.label, "has no result.json, because the job has not ended"))
        else:
            texts = [job.result.get("error"), *job.result.get("warnings", ())]
            found += [(job.label, text) for text in texts if text]
    for file, content in read.items():
        for name, routing in content.routing.items():
            found += [(name, f"{file}: {text}") for text in routing.get("warnings", ())]
    return found


def _lay_out(name: str, content: Evaluation) -> dict[str, Any]:
    charts = (
        interval_chart(task, {n: by_task.get(task, {}) for n, by_task in content.results.items()})
        for task in dict.fromkeys(task for by_task in content.results.values() for task in by_task)
    )
    return {
        "name": name,
        "tables": content.tables(),
        "charts": list(filter(None, charts)),
        "mixtures": [lay_out(adapter, routing) for adapter, routing in content.routing.items()],
    }


def lay_out(name: str, routing: Fields) -> dict[str, Any]:
    covered = {task: one for task, one in routing["tasks"].items() if one.get("load")}
    found = routing.get("specialisation", {})
    examples = {task: one["example"] for task, one in covered.items() if "example" in one}
    rows = _rows(routing, [*covered.values()]) if covered else []
    if by_prompt := routing["layers"] == ["0.prompt"]:  # a router has chosen once for a prompt
        rows = [{**_rows(routing, [of])[0], "label": task} for task, of in covered.items()]
        found, examples = {}, {}  # what such a choice tells about the prompt's tokens is nothing
    sizes = {*(routing.get("experts_by_layer") or [routing["num_experts"]])}
    return {
        "name": name,
        "routing": routing,
        "coverage": _coverage([*routing["tasks"].values()]),
        "expert_names": routing.get("expert_names") or range(routing["num_experts"]),
        "layers": rows,
        "by": "task" if by_prompt else "layer",
        "specialisation": [_specialisation(found[k], k, routing["layers"]) for k in found],
        "examples": examples,
        "uniform_bits": " or ".join(f"{math.log2(size):.2f}" for size in sorted(sizes)),
    }


def _coverage(tasks: Sequence[Fields]) -> str:
    keys = ("num_questions_covered", "num_questions", "num_tokens")
    covered, asked, tokens = (sum(task[key] for task in tasks) for key in keys)
    text = f"{covered:,} of {asked:,} questions, {tokens:,} tokens."
    kept = " The other scores are cached; evaluate with --no-cache to cover all questions."
    return text + kept if covered < asked else text


def _rows(routing: Fields, tasks: Sequence[Fields]) -> list[dict[str, Any]]:
    """By layer, over all tasks by their tokens: the load, and figures behind it, in bits."""
    weights = [task["num_tokens"] for task in tasks]

    def mean(key: str) -> np.ndarray:
        return np.average([task[key] for task in tasks], axis=0, weights=weights)

    load, entropy = mean("load"), mean("mean_entropy_bits")
    if all("mean_probabilities" in task for task in tasks):  # not in files of earlier versions
        entropy = entropy_bits(mean("mean_probabilities"))
    figures = np.stack([2 ** entropy_bits(load), entropy, mean("token_entropy_bits")], axis=1)
    sizes = routing.get("experts_by_layer") or [None] * len(load)
    return [
        {"label": label, "load": row[:size].tolist(), "figures": of.tolist()}
        for label, row, of, size in zip(routing["layers"], load, figures, sizes, strict=True)
    ]


def entropy_bits(shares: np.ndarray) -> np.ndarray:
    """Compute the entropy of each row, as `loraloom.routing.tally` does on tensors."""
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(-1)


def _specialisation(found: Mapping[str, Any], kind: str, layers: Sequence[Any]) -> dict[str, Any]:
    """By layer the mutual information, each class's load's distance from all's, and its mean."""
    by_layer = list(zip(*found["of"].values(), strict=True))
    return {
        "what": _CLASSES[kind],
        "classes": list(found["of"]),
        "rows": list(zip(layers, found["bits"], by_layer, strict=True)),
        # At least a millibit, to compare others with.
        "mean": max(0.001, fmean(value for values in by_layer for value in values)),
    }


def level(multiple: int | float) -> int:
    """The level of a load, as a multiple of an even share: 0 is unused, 3 about even, 5 most."""
    return sum(multiple >= bound for bound in LEVELS)
