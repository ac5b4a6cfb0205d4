"""What an evaluation gives: one type for choices, held-out rows and lm-eval's tasks.

`Evaluation` is written to JSON and read from it, laid out in tables and in a data frame. Fields
that have no name here are kept as they are, so that files with more of them can be read.
docs/result_files.md describes the fields of `results`, `seeds` and `routing`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from loraloom.atomic_io import write_output
from loraloom.config.fields import checked
from loraloom.config.text import read_json
from loraloom.errors import ConfigError, DataError
from loraloom.terminal import make_table

if TYPE_CHECKING:
    from pandas import DataFrame

MARK = "†"
ACCURACY = "accuracy %"
LOSS = "loss, nats a token"
_UNITS = {"accuracy": "points", "loss": "nats a token"}
NOTE = f"{MARK} no better than the majority class: always the most frequent answer"

# Of the data frame, those that there are.
_COLUMNS = (
    "adapter", "task", "split", "group", "accuracy", "loss", "stderr", "low", "high", "perplexity",
    "num_examples", "num_tokens", "majority",
)  # fmt: skip

# Comparisons that are told in a sentence each; of more, the table's stars name the winners.
MAX_MEANINGS = 8

SIGNIFICANCE = 0.05
POWER = 0.8
# A standard error of fewer differing examples is too rough for an estimate of a sample size.
MIN_DIFFERING = 10
INTERVAL_NOTE = (
    "An interval excludes 0 although p (Holm) is 0.05 or more. The interval is a bootstrap of one "
    "comparison, p (Holm) a test of all of them: trust p (Holm)."
)

# What results call the base model.
BASE = "base"

# Of the file. A field that goes or changes its meaning raises it, a new one does not.
SCHEMA_VERSION = 1

# What is compared: of accuracies more is better, of losses (in nats a token) less.
Metric = Literal["accuracy", "loss"]

Fields = dict[str, Any]


@dataclass(frozen=True)
class PairedComparison:
    """How much better one adapter is than another on the same questions.

    `stderr` is that of the difference, None for a single question. `interval` is a bootstrap's
    percentiles. `p_value` is two-sided, of McNemar's exact test for right and wrong answers of
    single adapters, else of a randomization test of the sum.
    """

    difference: float
    stderr: float | None
    interval: tuple[float, float]
    p_value: float
    num_first_better: int
    num_second_better: int
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class Comparison(PairedComparison):
    """Two contestants on a task; `adjusted_p_value` is Holm's over all that were made together."""

    task: str
    metric: Metric = "accuracy"
    first: str
    second: str
    adjusted_p_value: float


class Evaluation(BaseModel):
    """The results of an evaluation, with the fields of its JSON file.

    `results` contains the figures by adapter (`base` is the base model) and task; `scores`, which
    is not in the file, those of each item.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="allow")

    schema_version: Literal[1]
    results: dict[str, dict[str, Fields]]
    seeds: dict[str, Fields] = {}
    comparisons: list[Comparison] = []
    routing: dict[str, Fields] = {}
    adapters: dict[str, Fields] = {}
    tasks: dict[str, Fields] = {}
    num_cached_scores: int = 0
    scores: list[Any] = Field(default=[], exclude=True, repr=False)

    def tables(self) -> list[Table]:
        tables = [_results_table(self.results)]
        if self.seeds:
            tables.append(_seeds_table(self))
        if self.comparisons:
            tables.append(_comparison_table(self.comparisons))
        return tables

    def _repr_html_(self) -> str:
        from pandas import DataFrame

        html = ""
        for table in self.tables():
            frame = DataFrame([column.cells for column in table.columns]).T
            frame.columns = [str(column.header) for column in table.columns]
            html += f"<p>{table.title}</p>{frame.to_html(index=False)}"
            html += f"<p>{escape(str(table.caption or ''))}</p>".replace("\n", "<br>")
        return html

    def frame(self) -> DataFrame:
        """Lay the results out in rows: an adapter, a task, a group of questions, and figures."""
        from pandas import DataFrame

        rows = []
        for adapter, by_task in self.results.items():
            for (task, group), result in _with_groups(by_task).items():
                low, high = result.get("interval", (None, None))
                names = {"adapter": adapter, "task": task, "group": group}
                rows.append({**names, **result, "low": low, "high": high})
        return DataFrame(rows, dtype=object).filter(items=list(_COLUMNS))

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what `--per-question` writes, a line for each adapter and item."""
        return chain.from_iterable(task.lines for task in self.scores)

    def to_json(self) -> dict[str, Any]:
        """All results, as in the JSON file."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, path: str | Path) -> None:
        """Write a .json or .csv file.

        Raises:
            ConfigError: If the suffix is another one, or the file can't be written.
        """
        path = Path(path).expanduser()
        check_outputs([path])
        if path.suffix.lower() == ".csv":
            text = self.frame().to_csv(index=False, lineterminator="\n")
        else:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_output(path, text)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    texts = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    write_output(path, "".join(f"{text}\n" for text in texts))


def read_evaluation(path: Path) -> Evaluation:
    expected = f"{path} must be what `loraloom eval --output` wrote, got another file: "
    return checked(Evaluation, read_json(path, DataError), DataError, expected)


def check_outputs(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.suffix.lower() not in (".json", ".csv"):
            raise ConfigError(f"--output must end in .json, .csv, got {path}")


def _with_groups(by_task: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Fields]:
    """Results by task and group of questions, which is empty for all of them."""
    results = {}
    for task, result in by_task.items():
        split = {"split": result.get("split")}
        results[task, ""] = {**result, **split}
        for group, group_result in result.get("groups", {}).items():
            results[task, group] = {**group_result, **split}
    return results


def _results_table(results: Mapping[str, Mapping[str, Fields]]) -> Table:
    """Make a table with a column for each adapter, and a row for each figure in a task."""
    columns = [_with_groups(by_task) for by_task in results.values()]
    keys = dict.fromkeys(chain(*columns))
    by_key = {key: [column.get(key, {}) for column in columns] for key in keys}
    all_results = list(chain(*by_key.values()))
    has_constant = any("majority" in result for result in all_results)
    is_harness = any("metrics" in result for result in all_results)
    values = ["examples", *results]
    if has_constant:
        values.append("majority class")
    title = f"Results, with {'standard errors' if is_harness else '95 % intervals'}"
    table = make_table("task", "figure", values=values, title=title)
    for (task, group), adapter_results in by_key.items():
        first = next(filter(None, adapter_results))
        label = f"{task}/{group}" if group else task
        if first["split"] and not group:
            label += f" ({first['split']})"
        count = str(first.get("num_examples", ""))
        cells = [_cells(result) for result in adapter_results]
        for figure in dict.fromkeys(chain(*cells)):
            row = [by_figure.get(figure, "–") for by_figure in cells]
            if has_constant:
                row.append(_percent(first.get("majority")) if figure == ACCURACY else "")
            table.add_row(label, figure, count, *row)
    if any(result.get("beats_majority") is False for result in all_results):
        table.caption = NOTE
    return table


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    if "metrics" in result:  # lm-eval's, of which the accuracy is one
        return _harness_cells(result["metrics"])
    cells = {}
    interval = result.get("interval", ())
    if result.get("accuracy") is not None:
        text = _with_interval(_percent, result["accuracy"], interval)
        if result.get("beats_majority") is False:
            text += MARK
        cells[_accuracy_of(result)] = text
    if "loss" in result:
        cells[LOSS] = _with_interval(_decimals, result["loss"], interval)
    if result.get("perplexity") is not None:
        bounds = [math.exp(min(bound, 700)) for bound in interval]
        cells["perplexity"] = _with_interval("{:.4g}".format, result["perplexity"], bounds)
    return cells


def _harness_cells(metrics: Mapping[str, Mapping[str, float | None]]) -> dict[str, str]:
    cells = {}
    for name, metric in metrics.items():
        value, stderr = ("–" if number is None else _decimals(number) for number in metric.values())
        cells[name.removesuffix(",none")] = f"{value} ± {stderr}"
    return cells


def _accuracy_of(result: Mapping[str, Any]) -> str:
    return f"{result.get('metric', 'accuracy').replace('_', ' ')} %"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _decimals(value: float) -> str:
    return f"{value:.4f}"


def _with_interval(write: Callable[[float], str], value: float, interval: Sequence[float]) -> str:
    if not interval:
        return write(value)
    low, high = interval
    return f"{write(value)} ({write(low)}–{write(high)})"


def _seeds_table(evaluation: Evaluation) -> Table:
    values = ["seeds", "mean ± standard deviation"]
    table = make_table("adapters", "task", "figure", values=values, title="Means of seeds")
    for stem, group in evaluation.seeds.items():
        seeds = group["adapters"]
        first_results = evaluation.results.get(seeds[0], {})
        for task, figures in group["tasks"].items():
            result = first_results.get(task, {})
            figure = LOSS if "loss" in result else _accuracy_of(result)
            write: Any = _percent if figure.endswith("%") else _decimals
            spread = f"{write(figures['mean'])} ± {write(figures['sd'])}"
            table.add_row(stem, task, figure, str(len(seeds)), spread)
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Table:
    metrics = {comparison.metric for comparison in comparisons}
    units = sorted({_UNITS[metric] for metric in metrics}, reverse=True)
    titles = (" or ".join(units), "95 % interval", "won : lost", "p", "p (Holm)")
    table = make_table("difference", "task", values=titles, title="Differences on the same rows")
    for comparison in comparisons:
        difference = _signed(comparison.difference, comparison)
        if len(units) > 1:  # accuracies differ by points, losses by nats
            difference += f" {_UNITS[comparison.metric]}"
        low, high = comparison.interval
        star = " *" if _is_significant(comparison) else ""
        table.add_row(
            f"{comparison.first} - {comparison.second}",
            comparison.task,
            difference,
            f"{_signed(low, comparison)} to {_signed(high, comparison)}",
            f"{comparison.num_first_better} : {comparison.num_second_better}",
            _p_value_text(comparison.p_value),
            f"{_p_value_text(comparison.adjusted_p_value)}{star}",
        )
    lines = ["* significant: p (Holm), of all comparisons, < 0.05"]
    if len(comparisons) <= MAX_MEANINGS:
        lines += [_meaning(comparison, len(comparisons)) for comparison in comparisons]
    if any(map(_interval_contradicts_p, comparisons)):
        lines.append(INTERVAL_NOTE)
    table.caption = "\n".join(lines)
    return table


def _is_significant(comparison: Comparison) -> bool:
    return comparison.adjusted_p_value < SIGNIFICANCE


def _interval_contradicts_p(comparison: Comparison) -> bool:
    low, high = comparison.interval
    excludes_zero = low > 0 or high < 0
    return excludes_zero and not _is_significant(comparison)


def _signed(value: float, comparison: Comparison) -> str:
    return f"{100 * value:+.1f}" if comparison.metric == "accuracy" else f"{value:+.4f}"


def _p_value_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _meaning(comparison: Comparison, num_compared: int) -> str:
    """State who is better, or that no difference was found and how many examples would show it."""
    task = comparison.task
    metric = comparison.metric
    better, worse = comparison.first, comparison.second
    if (comparison.difference > 0) == (metric == "loss"):
        better, worse = worse, better
    if comparison.difference == 0:
        return f"{task}: {better} and {worse} have the same {metric}."
    if _is_significant(comparison):
        return f"{task}: {better} beats {worse} in {metric}, significantly."
    count = comparison.num_examples
    plural = "" if count == 1 else "s"
    text = f"{task}: no difference in {metric} was found between {better} and {worse}"
    text += f" on {count:,} example{plural}."
    num_needed = num_examples_needed(comparison, num_compared)
    if num_needed is not None and num_needed > count:
        rounded = float(f"{num_needed:.2g}")
        text += (
            f" To find this lead of {better} in {POWER:.0%} of tests takes about {rounded:,.0f}."
        )
    return text


def num_examples_needed(comparison: PairedComparison, num_compared: int = 1) -> int | None:
    """Estimate how many examples show a difference with 80 % power; None for too few differing."""
    num_differing = comparison.num_first_better + comparison.num_second_better
    if num_differing < MIN_DIFFERING or not comparison.stderr or not comparison.difference:
        return None
    # n' = n ((z_{1 - a / 2m} + z_power) stderr / difference)², since stderr falls with the root
    # of n; a / m is Bonferroni's level for m comparisons, the strictest that Holm's test has
    normal = NormalDist()
    num_errors = normal.inv_cdf(1 - SIGNIFICANCE / (2 * num_compared)) + normal.inv_cdf(POWER)
    ratio = num_errors * comparison.stderr / comparison.difference
    return math.ceil(comparison.num_examples * ratio**2)
