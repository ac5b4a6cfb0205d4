"""A run as one HTML page: results, learning curves, and where mixtures send their tokens."""

import math
from collections.abc import Iterable, Mapping, Sequence
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
    names_differ = len({path.name for path in evaluations}) == len(evaluations)
    by_file: dict[str, Evaluation] = {}
    for path in evaluations:
        by_file[path.name if names_differ else str(path)] = read_evaluation(path)
    try:
        return _render(jobs, by_file, summary)
    except _BAD as error:
        files = ", ".join(map(str, [*runs, *evaluations]))
        raise DataError(f"{files} are damaged or incomplete: {error}") from error


def _render(jobs: Sequence[Job], evaluations: Mapping[str, Evaluation], summary: str) -> str:
    results = [job.result for job in jobs if job.result is not None]
    environments = [result.get("environment", {}) for result in results]
    environments += map(dict, evaluations.values())
    content = {
        "title": ", ".join(_unique(job.run for job in jobs)),
        "summary": summary.strip(),
        "jobs": jobs,
        "drawn": _unique(name for job in jobs for name in job.drawn),
        "max_rows": MAX_ROWS,
        "facts": _facts(jobs, results, environments),
        "commands": _values_of("command", environments),
        "warnings": _warnings(jobs, evaluations),
        "metrics": _unique(name for result in results for name in result.get("metrics", ())),
        "styles": job_styles(jobs),
        "charts": learning_curves(jobs),
        "results": [_lay_out_evaluation(*entry) for entry in evaluations.items()],
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


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _values_of(name: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The different values of a field, in their order, without those that are empty."""
    return _unique(filter(None, (record.get(name) for record in records)))


def _facts(
    jobs: Sequence[Job], results: Sequence[Fields], environments: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    versions = [environment.get("versions", {}) for environment in environments]
    names = _unique(name for record in versions for name in record)
    packages = [f"{name} {'; '.join(_values_of(name, versions))}" for name in names]
    values = {
        "Base model": _values_of("base_model", [*results, *environments]),
        "Dtype": _values_of("dtype", environments),
        "Jobs": [f"{len(jobs)}"],
        "Evaluated": _values_of("date", environments),
        "Versions": [", ".join(packages)],
        "Device": _values_of("device", environments),
        "Platform": _values_of("platform", environments),
    }
    facts = {name: "; ".join(texts) for name, texts in values.items()}
    return {name: text for name, text in facts.items() if text}


def _warnings(jobs: Sequence[Job], evaluations: Mapping[str, Evaluation]) -> list[tuple[str, str]]:
    warnings = []
    for job in jobs:
        if job.result is None:
            warnings.append((job.label, "has no result.json, because the job has not ended"))
        else:
            texts = [job.result.get("error"), *job.result.get("warnings", ())]
            warnings += [(job.label, text) for text in texts if text]
    for file, evaluation in evaluations.items():
        for adapter, routing in evaluation.routing.items():
            warnings += [(adapter, f"{file}: {text}") for text in routing.get("warnings", ())]
    return warnings


def _lay_out_evaluation(file: str, evaluation: Evaluation) -> dict[str, Any]:
    charts = []
    for task in _unique(task for by_task in evaluation.results.values() for task in by_task):
        by_adapter = {name: by_task.get(task, {}) for name, by_task in evaluation.results.items()}
        charts.append(interval_chart(task, by_adapter))
    return {
        "name": file,
        "tables": evaluation.tables(),
        "charts": [chart for chart in charts if chart is not None],
        "mixtures": [lay_out(adapter, routing) for adapter, routing in evaluation.routing.items()],
    }


def lay_out(name: str, routing: Fields) -> dict[str, Any]:
    """Lay out where a mixture sends tokens, as the page's template shows it."""
    covered = {task: fields for task, fields in routing["tasks"].items() if fields.get("load")}
    is_by_prompt = routing["layers"] == ["0.prompt"]  # a router has chosen once for a prompt
    specialisation, examples = [], {}
    if is_by_prompt:  # what such a choice tells about the prompt's tokens is nothing
        rows = [{**_rows(routing, [fields])[0], "label": task} for task, fields in covered.items()]
    else:
        rows = _rows(routing, list(covered.values())) if covered else []
        examples = {task: x["example"] for task, x in covered.items() if "example" in x}
        for kind, fields in routing.get("specialisation", {}).items():
            specialisation.append(_specialisation(fields, kind, routing["layers"]))
    sizes = routing.get("experts_by_layer") or [routing["num_experts"]]
    return {
        "name": name,
        "routing": routing,
        "coverage": _coverage(list(routing["tasks"].values())),
        "expert_names": routing.get("expert_names") or range(routing["num_experts"]),
        "layers": rows,
        "by": "task" if is_by_prompt else "layer",
        "specialisation": specialisation,
        "examples": examples,
        "uniform_bits": " or ".join(f"{math.log2(size):.2f}" for size in sorted({*sizes})),
    }


def _coverage(tasks: Sequence[Fields]) -> str:
    num_covered = sum(task["num_questions_covered"] for task in tasks)
    num_questions = sum(task["num_questions"] for task in tasks)
    num_tokens = sum(task["num_tokens"] for task in tasks)
    text = f"{num_covered:,} of {num_questions:,} questions, {num_tokens:,} tokens."
    if num_covered < num_questions:
        text += " The other scores are cached; evaluate with --no-cache to cover all questions."
    return text


def _rows(routing: Fields, tasks: Sequence[Fields]) -> list[dict[str, Any]]:
    """By layer, over all tasks by their tokens: the load, and figures behind it, in bits."""
    import torch

    from loraloom.routing.tally import effective_number, entropy_bits

    weights = [task["num_tokens"] for task in tasks]

    def mean(key: str) -> torch.Tensor:
        return torch.from_numpy(np.average([task[key] for task in tasks], axis=0, weights=weights))

    load = mean("load")
    mean_entropy = mean("mean_entropy_bits")
    if all("mean_probabilities" in task for task in tasks):  # not in files of earlier versions
        mean_entropy = entropy_bits(mean("mean_probabilities"))
    figures = [effective_number(load), mean_entropy, mean("token_entropy_bits")]
    sizes = routing.get("experts_by_layer") or [None] * len(load)
    columns = [routing["layers"], load.tolist(), torch.stack(figures, dim=1).tolist(), sizes]
    return [
        {"label": label, "load": shares[:size], "figures": values}
        for label, shares, values, size in zip(*columns, strict=True)
    ]


def _specialisation(fields: Fields, kind: str, layers: Sequence[Any]) -> dict[str, Any]:
    """By layer the mutual information, each class's load's distance from all's, and its mean."""
    by_class = fields["of"]
    by_layer = list(zip(*by_class.values(), strict=True))
    return {
        "what": _CLASSES[kind],
        "classes": list(by_class),
        "rows": list(zip(layers, fields["bits"], by_layer, strict=True)),
        # At least a millibit, to compare others with.
        "mean": max(0.001, fmean(value for values in by_layer for value in values)),
    }


def level(multiple: int | float) -> int:
    """The level of a load, as a multiple of an even share: 0 is unused, 3 about even, 5 most."""
    return sum(multiple >= bound for bound in LEVELS)
