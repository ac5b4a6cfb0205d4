"""What an evaluation gives: one type for choices, held-out rows and lm-eval's tasks.

`Evaluation` is written to JSON and read from it, laid out in tables and in a data frame. Fields
that have no name here are kept as they are, so that files with more of them can be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table
from typing_extensions import TypedDict

from loraloom.config.text import read_json
from loraloom.durable import write_output
from loraloom.errors import ConfigError, DataError
from loraloom.terminal import make_table

if TYPE_CHECKING:
    from pandas import DataFrame

SUFFIXES = (".json", ".csv", ".md")

# What tables call the answer that is the same to every question, the most frequent right one.
CONSTANT = "constant answer"
MARK = "†"
NOTE = f"{MARK} no better than a constant answer: always the most frequent right one"

# Of what is compared: the unit of differences, how many of it make one, and decimals.
_UNITS = {"accuracy": ("points", 100, 1), "loss": ("nats a token", 1, 4)}

# Of the data frame, those that there are.
_COLUMNS = (
    "adapter", "task", "split", "group", "accuracy", "loss", "stderr", "low", "high", "perplexity",
    "num_examples", "num_tokens", "reward_accuracy", "reward_margin", "majority",
)  # fmt: skip

# What results call the base model.
BASE = "base"

# Of the file. A field that goes or changes its meaning raises it, a new one does not.
SCHEMA_VERSION = 1

# What is compared: of accuracies more is better, of losses (in nats a token) less.
Metric = Literal["accuracy", "loss"]

Fields = dict[str, Any]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
# As much as float32 holds.
Number = Annotated[float, Field(ge=-1e39, le=1e39, allow_inf_nan=False)]
Interval = Annotated[list[Number], Field(min_length=2, max_length=2)]


class TaskResult(TypedDict, total=False):
    """An adapter's figures in a task or on a data set, those that it has."""

    accuracy: Share | None
    loss: Number
    stderr: Number | None
    interval: Interval
    perplexity: Number | None
    num_examples: Count | None
    num_tokens: Count
    majority: Share
    beats_majority: bool
    split: str | None
    num_truncated: Count
    groups: dict[str, TaskResult]
    # of preference pairs
    accuracy_interval: Interval
    reward_accuracy: Share
    reward_margin: Number
    reward_margin_stderr: Number | None
    reward_margin_interval: Interval
    # of lm-eval
    metric: str
    metrics: dict[str, Fields]
    num_fewshot: int | None
    subtasks: list[str]


class SeedGroup(TypedDict):
    """Adapters that are seeds of one thing, and their `mean` and `sd` by task."""

    adapters: list[str]
    tasks: dict[str, dict[str, Number | None]]


@dataclass(frozen=True)
class PairedComparison:
    """How much better one adapter is than another on the same questions.

    `stderr` is that of the difference, None for a single question. `interval` is a bootstrap's
    percentiles. `p_value` is two-sided, of the exact sign test over questions, which is McNemar's
    test where both are single adapters.
    """

    difference: Number
    stderr: Number | None
    interval: tuple[Number, Number]
    p_value: Share
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
    adjusted_p_value: Share

    @property
    def result(self) -> PairedComparison:
        """The comparison itself, which once was a part of its own."""
        return self


class TaskRouting(TypedDict, total=False):
    """A mixture's routing in a task; lists are by layer, and absent where nothing is covered."""

    num_questions: Required[Count]
    num_questions_covered: Required[Count]
    num_tokens: Required[Count]
    load: list[list[Share]]
    effective_experts: list[Number]
    mean_probabilities: list[list[Share]]
    mean_entropy_bits: list[Number]
    token_entropy_bits: list[Number]
    example: Fields


class AdapterRouting(TypedDict, total=False):
    """A mixture's routing in all tasks."""

    num_experts: Required[Annotated[int, Field(ge=1, le=1024)]]
    top_k: Required[Count]
    layers: Required[list[int | str]]
    experts_by_layer: list[int]
    tasks: Required[dict[str, TaskRouting]]
    similarity: list[Fields]
    specialisation: dict[Literal["topics", "token_classes"], Fields]
    words: list[Fields]
    warnings: list[str]


class Environment(BaseModel):
    """With what a run was made."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    versions: dict[str, str] = {}
    platform: str = ""
    device: str = ""
    dtype: str = ""
    command: str = ""


class Evaluation(Environment):
    """What an evaluation gave, field by field as in its JSON file.

    `results` are figures by adapter (`base` is the base model) and task; `scores` are those of
    every item, which the file doesn't hold.
    """

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1]
    results: dict[str, dict[str, TaskResult]]
    seeds: dict[str, SeedGroup] = {}
    comparisons: list[Comparison] = []
    routing: dict[str, AdapterRouting] = {}
    base_model: str = ""
    base_fingerprint: str = ""
    attention: str = ""
    adapters: dict[str, Fields] = {}
    tasks: dict[str, Fields] = {}
    date: str = ""
    num_cached_scores: Count = 0
    scores: list[Any] = Field(default=[], exclude=True, repr=False)

    def tables(self) -> list[Table]:
        """Make every table that there is something for, in the order to show them."""
        return evaluation_tables(self)

    def frame(self) -> DataFrame:
        """Lay the results out in rows: an adapter, a task, a group of questions, and figures."""
        return data_frame(self.results)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what `--per-question` writes, a line for each adapter and item."""
        return chain.from_iterable(task.lines() for task in self.scores)

    def to_json(self) -> dict[str, Any]:
        """Everything, as it stands in the JSON file."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, path: str | Path) -> None:
        """Write a .json, .csv or .md file.

        Raises:
            ConfigError: If the suffix is another one, or the file can't be written.
        """
        path = Path(path)
        check_outputs([path])
        match path.suffix.lower():
            case ".csv":
                text = self.frame().to_csv(index=False, lineterminator="\n")
            case ".md":
                text = markdown_page(self)
            case _:
                text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
                text += "\n"
        write_output(path, text)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines of JSON, such as those of `Evaluation.lines`."""
    texts = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    write_output(path, "".join(f"{text}\n" for text in texts))


def read_evaluation(path: Path) -> Evaluation:
    if not path.is_file():
        raise ConfigError(f"--eval must be a file of `loraloom eval --output`, got {path}")
    try:
        return Evaluation.model_validate(read_json(path, DataError))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        reason = ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))
        expected = "must be what `loraloom eval --output` wrote, got another file"
        raise DataError(f"{path} {expected}: {reason}") from None


def check_outputs(paths: Sequence[Path], per_question: Path | None = None) -> None:
    """Raise a ConfigError if a file's suffix says nothing, or two files are one."""
    for path in paths:
        if path.is_dir():
            raise ConfigError(f"--output must be a file, got the directory {path}")
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"--output must end in {', '.join(SUFFIXES)}, got {path}")
    files = [*paths, *([] if per_question is None else [per_question])]
    if len({path.resolve() for path in files}) < len(files):
        names = ", ".join(map(str, files))
        raise ConfigError(f"--output and --per-question must name each file once, got {names}")


def evaluation_tables(found: Evaluation) -> list[Table]:
    """Make every table that there is something for, in the order to show them."""
    results, some = found.results, next(iter(found.results.values()))
    of_pairs = [task for task, result in some.items() if "reward_margin" in result]
    losses = [task for task, result in some.items() if "perplexity" in result]
    choices = [task for task in some if task not in (*of_pairs, *losses)]
    tables = []
    if choices:
        title = "Accuracy in %, with its 95 % interval"
        titles = [f"{task}\n({some[task].get('split')})" for task in choices]
        table = _by_adapter(title, results, choices, titles, lambda one: [accuracy_cell(one)])
        table.add_row(CONSTANT, *(_percent(some[task].get("majority")) for task in choices))
        tables.append(with_note(table))
    if losses:
        title = "Held-out loss, with its 95 % interval"
        titles = [f"{task}\n{what}" for task in losses for what in ("nats a token", "perplexity")]
        tables.append(_by_adapter(title, results, losses, titles, _loss_cells))
    if of_pairs:
        figures = ("accuracy %", "reward accuracy %", "reward margin", "loss")
        titles = [f"{task}\n{figure}" for task in of_pairs for figure in figures]
        title = "Preference pairs, with 95 % intervals"
        tables.append(_by_adapter(title, results, of_pairs, titles, _pair_cells))
    if found.seeds:
        tables.append(_seeds_table(found, list(some), is_loss=not choices))
    for task, comparisons in groupby(found.comparisons, lambda one: one.task):
        tables.append(_comparison_table(task, list(comparisons)))
    return tables + [_group_table(results, task) for task in choices if "groups" in some[task]]


def _by_adapter(
    title: str,
    results: Mapping[str, Mapping[str, TaskResult]],
    tasks: Sequence[str],
    titles: Sequence[str],
    cells: Callable[[Any], Sequence[str]],
) -> Table:
    """Make a table with a row for each adapter and some columns for each task."""
    table = make_table("adapter", values=titles, title=title)
    for adapter, by_task in results.items():
        table.add_row(adapter, *(cell for task in tasks for cell in cells(by_task[task])))
    return table


def _group_table(results: Mapping[str, Mapping[str, TaskResult]], task: str) -> Table:
    groups: Any = {adapter: by_task[task].get("groups") for adapter, by_task in results.items()}
    columns = ["questions", CONSTANT, *groups]
    table = make_table("group", values=columns, title=f"{task}: accuracy in % by group")
    for group, result in next(iter(groups.values())).items():
        cells = [accuracy_cell(of_adapter[group]) for of_adapter in groups.values()]
        table.add_row(group, str(result["num_examples"]), _percent(result["majority"]), *cells)
    return with_note(table)


def accuracy_cell(result: Any) -> str:
    """An accuracy in percent with its interval, marked where a constant answer reaches it."""
    mark = MARK if result.get("beats_majority") is False else ""  # files of old don't have it
    return f"{_percent(result.get('accuracy'), result.get('interval', ()))}{mark}"


def _percent(share: Any, interval: Sequence[float] = ()) -> str:
    text = "–" if share is None else f"{100 * share:.1f}"
    return f"{text} ({'–'.join(map(_percent, interval))})" if interval else text


def _decimals(value: float, interval: Sequence[float]) -> str:
    return f"{value:.4f} ({'–'.join(f'{end:.4f}' for end in interval)})"


def _loss_cells(result: Any) -> Sequence[str]:
    low, high = result["interval"]
    try:
        perplexity = f"{result['perplexity']:.4g} ({math.exp(low):.4g}–{math.exp(high):.4g})"
    except (OverflowError, TypeError):  # it is no number any more
        perplexity = "-"
    return _decimals(result["loss"], result["interval"]), perplexity


def _pair_cells(result: Any) -> Sequence[str]:
    return (
        _percent(result["accuracy"], result["accuracy_interval"]),
        _percent(result["reward_accuracy"]),
        _decimals(result["reward_margin"], result["reward_margin_interval"]),
        _decimals(result["loss"], result["interval"]),
    )


def _seeds_table(found: Evaluation, tasks: Sequence[str], *, is_loss: bool) -> Table:
    what = "Mean loss of seeds" if is_loss else "Mean accuracy of seeds in %"
    scale, digits = (1, 4) if is_loss else (100, 1)
    table = make_table("adapters", values=["seeds", *tasks], title=f"{what} ± standard deviation")
    for stem, group in found.seeds.items():
        spreads: Any = [group["tasks"][task] for task in tasks]
        pairs = [(scale * one["mean"], scale * one["sd"]) for one in spreads]
        cells = (f"{mean:.{digits}f} ± {sd:.{digits}f}" for mean, sd in pairs)
        table.add_row(stem, str(len(group["adapters"])), *cells)
    return table


def _comparison_table(task: str, comparisons: Sequence[Comparison]) -> Table:
    unit, scale, digits = _UNITS[comparisons[0].metric]
    titles = (unit, "95 % interval", "won : lost", "p", "p (Holm)")
    title = f"{task}: differences in {comparisons[0].metric}"
    table = make_table("difference", values=titles, title=title)
    for one in comparisons:
        ends = (one.difference, *one.interval)
        difference, low, high = (f"{scale * end:+.{digits}f}" for end in ends)
        p_values = (one.p_value, one.adjusted_p_value)
        table.add_row(
            f"{one.first} - {one.second}",
            difference,
            f"{low} to {high}",
            f"{one.num_first_better} : {one.num_second_better}",
            *("< 0.001" if p < 0.001 else f"{p:.3f}" for p in p_values),
        )
    return table


def with_note(table: Table) -> Table:
    cells = (str(cell) for column in table.columns for cell in column.cells)
    if any(MARK in cell for cell in cells):
        table.caption = NOTE
    return table


def markdown_page(found: Evaluation) -> str:
    """Write an evaluation's tables in Markdown, and below them how they were got."""
    asked = "; ".join(
        f"{task} by {one['scoring']} ({one['num_questions']} questions)"
        if "scoring" in one
        else f"{task} as {one['format']} ({one['num_examples']} rows, {one['num_tokens']} tokens)"
        for task, one in found.tasks.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    below = (
        f"Base model {found.base_model} ({found.base_fingerprint}) in {found.dtype}, attention "
        f"{found.attention}, on {found.device}; {asked}; {versions}; {found.date}.\n\n"
        f"```sh\n{found.command}\n```\n"
    )
    return "\n".join([*map(markdown, found.tables()), below])


def markdown(table: Table) -> str:
    """Write a table in Markdown, with its title above and its caption below."""
    columns = [
        [
            str(cell).replace("|", "\\|").replace("\n", " ")
            for cell in (column.header, *column.cells)
        ]
        for column in table.columns
    ]
    header, *rows = map(list, zip(*columns, strict=True))
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    above = "" if table.title is None else f"{table.title}:\n\n"
    below = "" if table.caption is None else f"\n{table.caption}\n"
    lines = [f"| {' | '.join(row)} |\n" for row in (header, rules, *rows)]
    return above + "".join(lines) + below


def data_frame(results: Mapping[str, Mapping[str, TaskResult]]) -> DataFrame:
    """Lay results out in rows: an adapter, a task, a group of questions, and the figures."""
    from pandas import DataFrame

    rows = []
    for adapter, by_task in results.items():
        for task, result in by_task.items():
            for group, one in [("", result), *result.get("groups", {}).items()]:
                low, high = one.get("interval", (None, None))
                names = {"adapter": adapter, "task": task, "split": result.get("split")}
                rows.append({**names, "group": group, **one, "low": low, "high": high})
    return DataFrame(rows, dtype=object).filter(items=list(_COLUMNS))
