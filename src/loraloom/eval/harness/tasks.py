"""lm-eval's tasks by name or of a directory of one's own, and its results in the form of our own.

{"results": {"base": {"arc_easy": {"accuracy": 0.4, "metric": "acc_norm,none", ...}}, ...},
"lm_eval": {"base": {...}, ...}}
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from loraloom.config.fields import suggestion
from loraloom.errors import ConfigError, DataError
from loraloom.eval.results import BASE, SCHEMA_VERSION, Evaluation, Fields
from loraloom.eval.score import Scores

# What `lm_eval.simple_evaluate` returns, by adapter.
Results = Mapping[str | None, Mapping[str, Any]]

# What counts as a task's accuracy, the first that it has.
_ACCURACIES = ("acc_norm", "acc", "exact_match")


def load_tasks(names: Sequence[str], include: Path | None = None) -> list[Task | Group]:
    manager = _find_manager(names, include)
    matches: list[str] = []
    for name in names:
        matches += _match(manager, name)
    loaded: list[Task | Group] = []
    for name in dict.fromkeys(matches):
        loaded += _load(manager, name)
    try:
        manager.load(loaded)
    except ValueError as error:
        raise ConfigError(f"--harness must name each task once; {error}") from None
    return loaded


def _find_manager(names: Sequence[str], include: Path | None) -> TaskManager:
    """Index tasks; lm-eval's own, which takes seconds, only where they are needed."""
    if include is None:
        return TaskManager()
    if not include.is_dir():
        raise ConfigError(f"--harness-include must be a directory of YAML files, got {include}")
    manager = TaskManager(include_path=str(include), include_defaults=False)
    has_all = set(names) <= set(manager.all_subtasks)
    return manager if has_all else TaskManager(include_path=str(include))


def _match(manager: TaskManager, name: str) -> list[str]:
    if name.endswith(".yaml") and Path(name).is_file():
        return [name]
    matches = list(manager.match_tasks([name]))
    if matches:
        return matches
    raise ConfigError(
        f"{suggestion(name, manager.all_tasks)}task must be one of lm-eval's "
        f"(`lm-eval ls tasks` lists them) or of --harness-include, got {name!r}"
    )


def _load(manager: TaskManager, name: str) -> list[Task | Group]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # of datasets, jinja2, yaml and the tasks' own code
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"task {name} could not be loaded: {reason}; without a network, list its files in a "
            "task of --harness-include (dataset_path: json, dataset_kwargs: data_files)"
        ) from error
    groups = loaded.get("groups", {})
    if name in groups:
        return [groups[name]]
    return list(loaded["tasks"].values())


def as_evaluation(by_adapter: Results, **details: Any) -> Evaluation:
    """Give figures by adapter and task: `accuracy`, where the task has one, and all `metrics`."""
    # `metrics` are by lm-eval's names, a metric and a filter; `metric` is the one `accuracy` is.
    results: dict[str, dict[str, Fields]] = {}
    plain = {}
    for adapter, output in by_adapter.items():
        name = adapter or BASE
        results[name] = {task: _result(output, task) for task in output["results"]}
        plain[name] = {key: value for key, value in output.items() if key != "samples"}
    details["lm_eval"] = _plain_json(plain)
    scores = Scores("lm-eval", {}, lines=list(question_lines(by_adapter)))
    return Evaluation(
        schema_version=SCHEMA_VERSION, results=results, tasks={}, scores=[scores], **details
    )


def _plain_json(value: Any) -> Any:
    text = json.dumps(value, default=handle_non_serializable)
    return json.loads(text, parse_constant=lambda _: None)  # infinity and NaN


def _result(output: Mapping[str, Any], task: str) -> Fields:
    figures = output["results"][task]
    metrics = {}
    for key, value in figures.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{filter_name}")
            metrics[key] = {"value": _number(value), "stderr": _number(stderr)}
    result: Fields = {
        "num_examples": figures.get("sample_len"),
        "num_fewshot": output["n-shot"].get(task),
        "metrics": metrics,
    }
    # the first filter of the first metric that counts as accuracy
    by_metric = {key.partition(",")[0]: key for key in reversed(metrics)}
    keys = [by_metric[name] for name in _ACCURACIES if name in by_metric]
    if keys:
        key = keys[0]
        value, stderr = metrics[key].values()
        result |= {"accuracy": value, "stderr": stderr, "metric": key}
        if value is not None and stderr is not None:
            result["interval"] = [value - 1.96 * stderr, value + 1.96 * stderr]  # 95 %
    config = output["configs"].get(task, {})
    split = config.get("test_split") or config.get("validation_split")
    if split:
        result["split"] = split
    return result


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None  # lm-eval says N/A where there is no standard error


def question_lines(by_adapter: Results) -> Iterator[dict[str, Any]]:
    """Yield what `--per-question` writes of each task, filter, adapter and question."""
    for adapter, output in by_adapter.items():
        for task, samples in output["samples"].items():
            for sample in samples:
                yield _plain_json(_question_line(task, adapter or BASE, sample))


def _question_line(task: str, adapter: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {metric: sample[metric] for metric in sample["metrics"]}
    accuracies = [metrics[name] for name in _ACCURACIES if name in metrics]
    line = {
        "task": task,
        "index": sample["doc_id"],
        "question": sample["doc_hash"][:16],
        "adapter": adapter,
        "filter": sample["filter"],
    }
    if accuracies and accuracies[0] in (0, 1):
        line["correct"] = bool(accuracies[0])
    return line | {
        "correct_label": sample["target"],
        "metrics": metrics,
        "responses": sample["filtered_resps"],
    }
