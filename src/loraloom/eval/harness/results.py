"""lm-eval's results in the form of our own, beside lm-eval's.

{"results": {"base": {"arc_easy": {"accuracy": 0.4, "metric": "acc_norm,none", ...}}, ...},
"lm_eval": {"base": {...}, ...}}
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.utils import handle_non_serializable
from rich.table import Table

from loraloom.eval.comparison import BASE
from loraloom.eval.harness.lm import Results
from loraloom.eval.statistics import wilson_interval
from loraloom.eval.tables import MARK, with_note
from loraloom.terminal import make_table

_ACCURACIES = ("acc_norm", "acc", "exact_match")
"""What counts as a task's accuracy, the first that it has."""


def summarise(results: Mapping[str | None, Results]) -> dict[str, dict[str, Any]]:
    """Give figures by adapter and task: `accuracy`, where the task has one, and all `metrics`.

    `metrics` are by lm-eval's names, a metric and a filter; `metric` is the one that `accuracy` is.
    `majority` is the accuracy of the best constant answer, where the samples tell it; `subtasks`
    are what a group consists of.
    """
    return {
        name or BASE: {task: _summary(of_adapter, task) for task in of_adapter["results"]}
        for name, of_adapter in results.items()
    }


def _summary(results: Results, task: str) -> dict[str, Any]:
    figures, config = results["results"][task], results["configs"].get(task, {})
    metrics, count = _metrics(figures), figures.get("sample_len")
    known = {key.partition(",")[0]: key for key in reversed(metrics)}
    main = next((known[name] for name in _ACCURACIES if name in known), None)
    summary: dict[str, Any] = {}
    if main is not None:
        value, stderr = metrics[main]["value"], metrics[main]["stderr"]
        summary["accuracy"] = value
        if value is not None and count:
            summary["interval"] = list(wilson_interval(value, count))
        majority = _majority(config, results.get("samples", {}).get(task, ()))
        if majority is not None and value is not None:
            summary |= {"majority": majority, "beats_majority": value > majority}
        summary |= {"stderr": stderr, "metric": main}
    summary["num_examples"] = count
    if split := config.get("test_split") or config.get("validation_split"):
        summary["split"] = split
    summary["num_fewshot"] = results["n-shot"].get(task)
    if subtasks := results.get("group_subtasks", {}).get(task):
        summary["subtasks"] = list(subtasks)
    return {**summary, "metrics": metrics}


def _majority(config: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of questions whose target is the most frequent one.

    None without samples, and where targets are no answers: the right choice has the same place in
    every question (sciq), or choices differ in their contexts (winogrande).
    """
    if isinstance(config.get("doc_to_target"), int) or any(map(_has_contexts, samples)):
        return None
    targets = {sample["doc_id"]: str(sample["target"]) for sample in samples}
    return max(Counter(targets.values()).values()) / len(targets) if targets else None


def _has_contexts(sample: Mapping[str, Any]) -> bool:
    """Whether the choices of a question have one continuation, each after a context of its own."""
    asked = sample.get("arguments", ())
    if not all(len(one) == 2 and isinstance(one[1], str) for one in asked):  # no log-likelihoods
        return False
    return len({text for _, text in asked}) == 1 < len({context for context, _ in asked})


def _metrics(figures: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Value and standard error of each metric; None where there is none."""
    metrics = {}
    for key, value in figures.items():
        metric, comma, chosen_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{chosen_filter}")
            metrics[key] = {"value": _number(value), "stderr": _number(stderr)}
    return metrics


def _number(value: Any) -> float | None:
    """A finite number, or None: lm-eval says N/A where there is no standard error."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def plain_results(results: Mapping[str | None, Results]) -> dict[str, Any]:
    """lm-eval's own results by adapter as JSON values, without the samples."""
    without = {
        name or BASE: {key: value for key, value in of_adapter.items() if key != "samples"}
        for name, of_adapter in results.items()
    }
    text = json.dumps(without, default=handle_non_serializable)
    return json.loads(text, parse_constant=lambda _: None)


def question_lines(results: Mapping[str | None, Results]) -> Iterator[dict[str, Any]]:
    """Yield what `--per-question` writes of each task, filter, adapter and question."""
    for name, of_adapter in results.items():
        for task, samples in of_adapter["samples"].items():
            for sample in samples:
                line = {
                    "task": task,
                    "index": sample["doc_id"],
                    "question": sample["doc_hash"][:16],
                    "adapter": name or BASE,
                    **_question(sample),
                }
                yield json.loads(json.dumps(line, default=handle_non_serializable))


def _question(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One question: log-likelihoods and the choice with the highest, or what was answered."""
    responses = sample["filtered_resps"]
    metrics = {metric: sample[metric] for metric in sample["metrics"]}
    accuracy = next((metrics[name] for name in _ACCURACIES if name in metrics), None)
    fields = {
        "filter": sample["filter"],
        **({"correct": bool(accuracy)} if accuracy in (0, 1) else {}),
        "correct_label": sample["target"],
        "metrics": metrics,
    }
    if all(map(_is_log_likelihood, responses)):
        scores = [response[0] for response in responses]
        if "acc_mutual_info" in metrics:  # as many again are without the question
            scores = scores[: len(scores) // 2]
        return {**fields, "chosen": scores.index(max(scores)), "scores": scores}
    return {**fields, "responses": responses}


def _is_log_likelihood(response: Any) -> bool:
    """Whether a response is a log-likelihood and whether the continuation is the likeliest."""
    is_pair = isinstance(response, list | tuple) and len(response) == 2
    return is_pair and isinstance(response[0], float)


def results_table(results: Mapping[str | None, Results]) -> Table:
    """Make a table with a row for each task and metric, and a column for each adapter."""
    summary = summarise(results)
    table = make_table(
        "task", "metric", values=["examples", "shots", *summary], title="Results of lm-eval"
    )
    for task, of_task in next(iter(summary.values())).items():
        for metric in of_task["metrics"]:
            cells = [_cell(by_task[task], metric) for by_task in summary.values()]
            labels = (task, metric.removesuffix(",none"))
            counts = (of_task["num_examples"], of_task["num_fewshot"])
            table.add_row(*labels, *map(str, counts), *cells)
    return with_note(table)


def _cell(of_task: Mapping[str, Any], metric: str) -> str:
    """A figure: an accuracy with its interval and mark, others with their standard errors."""
    figure = of_task["metrics"][metric]
    value, stderr = figure["value"], figure["stderr"]
    if value is None:
        return "-"
    count, majority = of_task["num_examples"], of_task.get("majority")
    if metric.partition(",")[0] in _ACCURACIES and count:
        low, high = wilson_interval(value, count)
        is_constant = majority is not None and value <= majority
        return f"{value:.3f} ({low:.3f}–{high:.3f}){MARK if is_constant else ''}"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
