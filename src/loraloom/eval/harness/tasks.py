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
from loraloom.eval.statistics import wilson_interval

# What `lm_eval.simple_evaluate` returns, by adapter.
Results = Mapping[str | None, Mapping[str, Any]]

# What counts as a task's accuracy, the first that it has.
_ACCURACIES = ("acc_norm", "acc", "exact_match")


def load_tasks(names: Sequence[str], include: Path | None = None) -> list[Task | Group]:
    """Load tasks, groups of tasks and tags with their data."""
    manager = _find_manager(names, include)
    tasks = dict.fromkeys(match for name in names for match in _match(manager, name))
    loaded = [task for name in tasks for task in _load(manager, name)]
    try:
        manager.load(loaded)
    except ValueError as error:
        raise ConfigError(f"--harness must name each task once; {error}") from None
    return loaded


def check_asks_text(loaded: Sequence[Task | Group]) -> None:
    """Refuse tasks that lm-eval wouldn't ask, before the model is there."""
    groups = [one.get_all_tasks() if isinstance(one, Group) else [one] for one in loaded]
    for mark, what in (("UNSAFE_CODE", "run code of the model's"), ("MULTIMODAL", "need images")):
        found = [task.task_name for group in groups for task in group if getattr(task, mark, False)]
        if found:
            raise ConfigError(f"--harness does not support tasks that {what}: {', '.join(found)}")


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
    if matches := manager.match_tasks([name]):
        return list(matches)
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
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    return [groups[name]] if name in groups else list(tasks.values())


def as_evaluation(found: Results, **details: Any) -> Evaluation:
    """Give figures by adapter and task: `accuracy`, where the task has one, and all `metrics`."""
    # `metrics` are by lm-eval's names, a metric and a filter; `metric` is the one `accuracy` is.
    plain = {n or BASE: {k: v for k, v in of.items() if k != "samples"} for n, of in found.items()}
    text = json.dumps(plain, default=handle_non_serializable)
    details["lm_eval"] = json.loads(text, parse_constant=lambda _: None)
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        results={n or BASE: {t: _result(of, t) for t in of["results"]} for n, of in found.items()},
        tasks={},
        **details,
    )


def _result(found: Mapping[str, Any], task: str) -> Fields:
    figures, config = found["results"][task], found["configs"].get(task, {})
    metrics = {}
    for key, value in figures.items():
        metric, comma, chosen_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{chosen_filter}")
            metrics[key] = {"value": _number(value), "stderr": _number(stderr)}
    result: Fields = {
        "num_examples": figures.get("sample_len"),
        "num_fewshot": found["n-shot"].get(task),
        "metrics": metrics,
    }
    known = {key.partition(",")[0]: key for key in reversed(metrics)}
    if main := next((known[name] for name in _ACCURACIES if name in known), None):
        value, stderr = metrics[main].values()
        result |= {"accuracy": value, "stderr": stderr, "metric": main}
        count = result["num_examples"] or 0
        # else it is a mean of other marks than right and wrong
        share = value if value is not None and 0 <= value <= 1 < count else math.nan
        error = math.sqrt(share * (1 - share) / max(count - 1, 1))
        if stderr is not None and math.isclose(stderr, error, rel_tol=1e-3):
            result["interval"] = list(wilson_interval(share, count))
    if split := config.get("test_split") or config.get("validation_split"):
        result["split"] = split
    return result


def _number(value: Any) -> float | None:
    """A finite number, or None: lm-eval says N/A where there is no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def question_lines(found: Results) -> Iterator[dict[str, Any]]:
    """Yield what `--per-question` writes of each task, filter, adapter and question."""
    for name, of_adapter in found.items():
        for task, samples in of_adapter["samples"].items():
            for sample in samples:
                metrics = {metric: sample[metric] for metric in sample["metrics"]}
                accuracy = next((metrics[n] for n in _ACCURACIES if n in metrics), None)
                line = {
                    "task": task,
                    "index": sample["doc_id"],
                    "question": sample["doc_hash"][:16],
                    "adapter": name or BASE,
                    "filter": sample["filter"],
                    **({"correct": bool(accuracy)} if accuracy in (0, 1) else {}),
                    "correct_label": sample["target"],
                    "metrics": metrics,
                    "responses": sample["filtered_resps"],
                }
                text = json.dumps(line, default=handle_non_serializable)
                yield json.loads(text, parse_constant=lambda _: None)  # infinity and NaN
