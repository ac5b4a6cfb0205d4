"""What an evaluation's JSON file holds, as `Evaluation.write` leaves it and a report reads it.

Fields that nobody here has a use for are passed over, so that files with more of them can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraloom.config.json_text import read_json
from loraloom.errors import ConfigError, DataError

SCHEMA_VERSION = 1
"""Of the file. A field that goes or changes its meaning raises it, a new one does not."""

Fields = dict[str, Any]
"""What is shown as it stands in the file."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=-1e39, le=1e39)]
"""As much as float32 holds."""
Positive = Annotated[float, Field(ge=0, le=1e39)]


class Record(BaseModel):
    """A part of a file that loraloom wrote."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


_Kind = TypeVar("_Kind", bound=Record)


class Environment(Record):
    """With what a run was made."""

    versions: dict[str, str] = {}
    platform: str = ""
    device: str = ""
    dtype: str = ""
    command: str = ""


class TaskResult(Record):
    """An adapter's accuracy in a task, or its loss on held-out rows; lm-eval's may have neither."""

    accuracy: Share | None = None
    stderr: Positive | None = None
    interval: tuple[Number, Number] | None = None
    num_examples: Count | None = None
    split: str | None = None
    majority: Share | None = None
    subtasks: tuple[str, ...] = ()
    loss: Number | None = None
    perplexity: Positive | None = None
    num_tokens: Count | None = None

    @property
    def is_constant(self) -> bool:
        """Whether the best constant answer is right as often."""
        if self.accuracy is None or self.majority is None:
            return False
        return self.accuracy <= self.majority


class SeedMean(Record):
    """Accuracies, or held-out losses, of several seeds in a task."""

    mean: Number
    sd: Positive | None = None


class SeedGroup(Record):
    """Adapters that are seeds of one thing."""

    adapters: tuple[str, ...]
    tasks: dict[str, SeedMean]


class ComparisonResult(Record):
    """Two contestants on the same questions of a task, or on the same rows held out."""

    task: str
    metric: str = "accuracy"
    first: str
    second: str
    difference: Number
    stderr: Positive | None = None
    interval: tuple[Number, Number]
    num_first_better: Count
    num_second_better: Count
    p_value: Share
    adjusted_p_value: Share


class TaskRouting(Record):
    """A mixture's routing in a task; rows by layer, empty where no question is covered."""

    num_questions: Count
    num_questions_covered: Count
    num_tokens: Count
    load: tuple[tuple[Share, ...], ...] = ()
    mean_probabilities: tuple[tuple[Share, ...], ...] = ()
    mean_entropy_bits: tuple[Positive, ...] = ()
    token_entropy_bits: tuple[Positive, ...] = ()
    example: Fields | None = None
    """A text's `tokens`, and by router the first choice of each as `experts`."""


class AdapterRouting(Record):
    """A mixture's routing in all tasks."""

    num_experts: int = Field(ge=1, le=1024)
    top_k: Count
    layers: tuple[Count | str, ...]
    experts_by_layer: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    tasks: dict[str, TaskRouting]
    similarity: tuple[Fields, ...] = ()
    """`first` and `second` task, and their `mean` likeness."""
    specialisation: dict[Literal["topics", "token_classes"], dict[Literal["bits", "of"], Any]] = {}
    """By layer, what an expert says about the class of a token, and how each class is set apart."""
    words: tuple[Fields, ...] = ()
    """The typical words of each expert of a `layer`."""
    warnings: tuple[str, ...] = ()


class EvaluationFile(Environment):
    """The JSON file of `loraloom eval --output`; its version says what the fields hold."""

    schema_version: Literal[1]
    results: dict[str, dict[str, TaskResult]]
    seeds: dict[str, SeedGroup] = {}
    comparisons: tuple[ComparisonResult, ...] = ()
    routing: dict[str, AdapterRouting] = {}
    base_model: str = ""
    tasks: dict[str, Fields] = {}
    date: str = ""


def read_evaluation(path: Path) -> EvaluationFile:
    """Read an evaluation's JSON file."""
    if not path.is_file():
        raise ConfigError(f"--eval must be a file of `loraloom eval --output`, got {path}")
    return read_record(path, EvaluationFile, "what `loraloom eval --output` wrote")


def read_record(path: Path, kind: type[_Kind], expected: str) -> _Kind:
    """Read a JSON file."""
    try:
        return kind.model_validate(read_json(path, DataError))
    except ValidationError as error:
        raise DataError(
            f"{path} must be {expected}, got another file: {first_fault(error)}"
        ) from None


def first_fault(error: ValidationError) -> str:
    """Say what is wrong first, and where."""
    fault = error.errors(include_url=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return f"{place}: {fault['msg']}" if place else fault["msg"]
