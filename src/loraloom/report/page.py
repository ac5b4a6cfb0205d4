"""A run as one HTML page: results, learning curves, and where mixtures send their tokens."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import loraloom
from loraloom.eval.results import Fields, read_evaluation
from loraloom.report.charts import learning_curves
from loraloom.report.jobs import read_runs

LEVELS = (0.01, 0.33, 0.67, 1.5, 3.0)  # loads where a cell's color changes, in even shares
MAX_ROWS = 20  # of a table of results; a longer one is folded


def make_page(runs: Sequence[Path], evaluations: Sequence[Path] = (), *, summary: str = "") -> str:
    jobs = read_runs(runs)
    by_file = {path.name: read_evaluation(path) for path in evaluations}
    if len(by_file) < len(evaluations):
        by_file = {str(path): read_evaluation(path) for path in evaluations}
    tables_by_file = []
    for file, evaluation in by_file.items():
        mixtures = [lay_out(adapter, routing) for adapter, routing in evaluation.routing.items()]
        laid_out = {"name": file, "tables": evaluation.tables(), "mixtures": mixtures}
        tables_by_file.append(laid_out)
    results = [job.result for job in jobs if job.result is not None]
    environments = [dict(result.get("environment", {})) for result in results]
    environments += [dict(evaluation) for evaluation in by_file.values()]
    content = {
        "summary": summary.strip(),
        "jobs": jobs,
        "results": results,
        "environments": environments,
        "max_rows": MAX_ROWS,
        "charts": learning_curves(jobs),
        "evaluations": tables_by_file,
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
        "level": partial(bisect_right, LEVELS),  # 0 is unused, 3 about even, 5 most
        "log2": math.log2,
        "gib": lambda value: f"{value / 2**30:.2f} GiB",
        "rows": lambda table: zip(*(column.cells for column in table.columns), strict=True),
    }
    return environment.get_template("page.html.j2").render(content)


def lay_out(name: str, routing: Fields) -> dict[str, Any]:
    covered = {task: fields for task, fields in routing["tasks"].items() if fields.get("load")}
    is_by_prompt = routing["layers"] == ["0.prompt"]  # a router has chosen once for a prompt
    rows = []
    if is_by_prompt:
        for task, fields in covered.items():
            rows.append({**_rows(routing, [fields])[0], "label": task})
    elif covered:
        rows = _rows(routing, list(covered.values()))
    return {
        "name": name,
        "routing": routing,
        "by": "task" if is_by_prompt else "layer",
        "layers": rows,
        "expert_names": routing.get("expert_names") or range(routing["num_experts"]),
    }


def _rows(routing: Fields, tasks: Sequence[Fields]) -> list[dict[str, Any]]:
    """By layer, over all tasks by their tokens: the load, and figures behind it, in bits."""
    import torch

    from loraloom.routing.tally import effective_number, entropy_bits

    weights = [task["num_tokens"] for task in tasks]

    def mean(key: str) -> torch.Tensor:
        values = [task[key] for task in tasks]
        return torch.from_numpy(np.average(values, axis=0, weights=weights))

    load = mean("load")
    mean_entropy = mean("mean_entropy_bits")
    if all("mean_probabilities" in task for task in tasks):  # not in files of earlier versions
        mean_entropy = entropy_bits(mean("mean_probabilities"))
    figures = [effective_number(load), mean_entropy, mean("token_entropy_bits")]
    by_layer = torch.stack(figures, dim=1)
    sizes = routing.get("experts_by_layer") or [None] * len(load)
    rows = []
    for index, label in enumerate(routing["layers"]):
        row = {
            "label": label,
            "load": load[index, : sizes[index]].tolist(),
            "figures": by_layer[index].tolist(),
        }
        rows.append(row)
    return rows
