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

from loraloom.eval.results import BASE, MARK, SCHEMA_VERSION, Evaluation, TaskResult, with_note
from loraloom.eval.statistics import wilson_interval
from loraloom.terminal import make_table

# What `lm_eval.simple_evaluate` returns, by adapter.
Results = Mapping[str | None, Mapping[str, Any]]

# What counts as a task's accuracy, the first that it has.
_ACCURACIES = ("acc_norm", "acc", "exact_match")


def as_evaluation(found: Results, **details: Any) -> Evaluation:
    """Give figures by adapter and task: `accuracy`, where the task has one, and all `metrics`.

    `metrics` are by lm-eval's names, a metric and a filter; `metric` is the one that `accuracy` is.
    `majority` is the accuracy of the best constant answer, where the samples tell it; `subtasks`
    are what a group consists of. lm-eval's own results, without the samples, are `lm_eval`.
    """
    plain = {n or BASE: {k: v for k, v in of.items() if k != "samples"} for n, of in found.items()}
    text = json.dumps(plain, default=handle_non_serializable)
    details["lm_eval"] = json.loads(text, parse_constant=lambda _: None)
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        results={n or BASE: {t: _result(of, t) for t in of["results"]} for n, of in found.items()},
        tasks={},
        **details,
    )


def _result(found: Mapping[str, Any], task: str) -> TaskResult:
    figures, config = found["results"][task], found["configs"].get(task, {})
    metrics = {}
    for key, value in figures.items():
        metric, comma, chosen_filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{chosen_filter}")
            metrics[key] = {"value": _number(value), "stderr": _number(stderr)}
    known = {key.partition(",")[0]: key for key in reversed(metrics)}
    main = next((known[name] for name in _ACCURACIES if name in known), None)
    result: TaskResult = {
        "num_examples": figures.get("sample_len"),
        "num_fewshot": found["n-shot"].get(task),
        "metrics": metrics,
    }
    if main is not None:
        value = metrics[main]["value"]
        result |= {"accuracy": value, "stderr": metrics[main]["stderr"], "metric": main}
        if value is not None and result["num_examples"]:
            result["interval"] = list(wilson_interval(value, result["num_examples"]))
        majority = _majority(config, found.get("samples", {}).get(task, ()))
        if majority is not None and value is not None:
            result |= {"majority": majority, "beats_majority": value > majority}
    if split := config.get("test_split") or config.get("validation_split"):
        result["split"] = split
    if subtasks := found.get("group_subtasks", {}).get(task):
        result["subtasks"] = list(subtasks)
    return result


def _number(value: Any) -> float | None:
    """A finite number, or None: lm-eval says N/A where there is no standard error."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


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


def question_lines(found: Results) -> Iterator[dict[str, Any]]:
    """Yield what `--per-question` writes of each task, filter, adapter and question."""
    for name, of_adapter in found.items():
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
    # a log-likelihood comes with whether the continuation is the likeliest
    pairs = [one for one in responses if isinstance(one, list | tuple) and len(one) == 2]
    if len(pairs) < len(responses) or not all(isinstance(one[0], float) for one in pairs):
        return {**fields, "responses": responses}
    scores = [score for score, _ in pairs]
    if "acc_mutual_info" in metrics:  # as many again are without the question
        scores = scores[: len(scores) // 2]
    return {**fields, "chosen": scores.index(max(scores)), "scores": scores}


def results_table(found: Evaluation) -> Table:
    """Make a table with a row for each task and metric, and a column for each adapter."""
    results: Any = found.results
    columns = ["examples", "shots", *results]
    table = make_table("task", "metric", values=columns, title="Results of lm-eval")
    for task, some in next(iter(results.values())).items():
        counts = (str(some["num_examples"]), str(some["num_fewshot"]))
        for metric in some["metrics"]:
            cells = [_cell(by_task[task], metric) for by_task in results.values()]
            table.add_row(task, metric.removesuffix(",none"), *counts, *cells)
    return with_note(table)


def _cell(result: Any, metric: str) -> str:
    """A figure: an accuracy with its interval and mark, others with their standard errors."""
    value, stderr = result["metrics"][metric].values()
    if value is None:
        return "-"
    if metric.partition(",")[0] in _ACCURACIES and result["num_examples"]:
        low, high = wilson_interval(value, result["num_examples"])
        mark = MARK if value <= result.get("majority", -1) else ""
        return f"{value:.3f} ({low:.3f}–{high:.3f}){mark}"
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"
