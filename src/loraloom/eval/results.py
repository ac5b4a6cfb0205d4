"""What an evaluation gives: one type for choices, held-out rows and lm-eval's tasks.

`Evaluation` is written to JSON and read from it. Fields that have no name here are kept as they
are, so that files with more of them can be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table
from typing_extensions import TypedDict

from loraloom.config.text import read_json
from loraloom.durable import write_output
from loraloom.errors import ConfigError, DataError
from loraloom.eval import tables

if TYPE_CHECKING:
    from pandas import DataFrame

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
        return tables.evaluation_tables(self)

    def frame(self) -> DataFrame:
        """Lay the results out in rows: an adapter, a task, a group of questions, and figures."""
        return tables.data_frame(self.results)

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
        tables.check_outputs([path])
        match path.suffix.lower():
            case ".csv":
                text = self.frame().to_csv(index=False, lineterminator="\n")
            case ".md":
                text = tables.markdown_page(self)
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
