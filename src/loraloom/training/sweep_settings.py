"""What a sweep tries: the `sweep:` section of a run file.

    sweep:
      job: {adapter: {method: lora, rank: 8}, data: {...}, train: {...}}
      parameters:
        train.learning_rate: {log_uniform: [1e-5, 1e-2]}
        adapter.rank: [4, 16]
      search: {tpe: 30}

Every combination is a job, called after its number and values: `sweep-000-0.0001-4`, for example.
Optuna draws them, and has the values of a list as JSON text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, product, repeat, takewhile
from operator import mul
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from typing_extensions import override

from loraloom.config.fields import StrictModel
from loraloom.errors import ConfigError, shown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_JOBS = 512
# Random jobs that TPE begins with, as many as Optuna's sampler wants to have seen.
TPE_STARTUP_JOBS = 10
TPE_CONCURRENT_JOBS = 4
_SEARCHES = "grid, {random: how many, seed: 0} or {tpe: how many, seed: 0}"


def distribution_of(values: Any) -> BaseDistribution:
    kinds = load_optuna().distributions
    try:
        match values:
            case dict() if len(values) > 1:  # none of two ranges is ignored
                pass
            case {"uniform": (low, high)}:
                return kinds.FloatDistribution(low, high)
            case {"log_uniform": (low, high)}:
                return kinds.FloatDistribution(low, high, log=True)
            case {"int_uniform": (int(low), int(high))}:
                return kinds.IntDistribution(low, high)
            case (_, *_):
                return kinds.CategoricalDistribution([*map(json.dumps, values)])
    except (TypeError, ValueError):  # ends in the wrong order; no JSON, a date for example
        pass
    raise ValueError(
        "must be a list of JSON values, or a range with low <= high: {uniform: [low, high]}, "
        f"{{log_uniform: ...}} above 0, {{int_uniform: ...}} of whole numbers; got {shown(values)}"
    )


# Values to try, or a range to draw from.
Parameter = Annotated[
    tuple[Any, ...] | dict[str, tuple[int | float, int | float]],
    BeforeValidator(lambda values: distribution_of(values) and values),
]


class DrawnSearch(StrictModel):
    """Draw combinations: at random, or by Optuna's TPE sampler, which learns from ended jobs."""

    random: int | None = Field(default=None, ge=1, le=MAX_JOBS)
    """Number of random draws; or set tpe."""
    tpe: int | None = Field(default=None, ge=1, le=MAX_JOBS)
    """Number of TPE draws, the first ten of which are random; or set random."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draws. A larger number of them begins with the same ones."""

    @override
    def contradictions(self) -> Iterator[str]:
        if (self.random is None) == (self.tpe is None):
            yield f"search must be {_SEARCHES}"


class HalvingConfig(StrictModel):
    """Successive halving: only the best jobs at each rung continue."""

    reduction_factor: int = Field(default=3, ge=2)
    """Continue one in N jobs after each rung."""
    min_steps: int = Field(ge=1)
    """The first rung; the others are this times the powers of reduction_factor."""

    def rungs(self, total_steps: int) -> list[int]:
        """The rungs of a job of so many steps; at its last step there is nothing left to save."""
        powers = accumulate(repeat(self.reduction_factor), mul, initial=self.min_steps)
        return list(takewhile(lambda rung: rung < total_steps, powers))


class SweepStoppingConfig(StrictModel):
    """Early stopping of jobs."""

    asha: HalvingConfig
    """Successive halving (Li et al. 2020, arXiv:1810.05934), in the form that stops jobs."""


# A fault of a plain union would name both members.
_by_form = Discriminator(
    lambda search: search if isinstance(search, str) else "drawn",
    custom_error_type="search",
    custom_error_message=f"must be {_SEARCHES}",
)


class SweepConfig(StrictModel):
    """Many versions of one job, with different values of some settings."""

    job: dict[str, Any]
    """Settings of the job."""
    parameters: dict[str, Parameter] = Field(min_length=1)
    """Settings of the job, such as train.learning_rate, and the values of each: a list; or, except
    for a grid search, a range: {uniform: [low, high]}, {log_uniform: ...}, {int_uniform: ...}."""
    search: Annotated[
        Annotated[Literal["grid"], Tag("grid")] | Annotated[DrawnSearch, Tag("drawn")], _by_form
    ] = "grid"
    """grid (all combinations), {random: how many, seed: 0} or {tpe: how many, seed: 0}."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Maximum number of jobs at once; null: all of a grid or a random search, 4 of tpe."""
    metric: str = "eval/loss"
    """Metric that ranks the jobs, by its name in metrics.jsonl."""
    early_stopping: SweepStoppingConfig | None = None
    """Stop jobs that perform badly; null: train all jobs to the end."""

    @override
    def contradictions(self) -> Iterator[str]:
        ranges = [path for path, values in self.parameters.items() if isinstance(values, dict)]
        take = "take search: {random: how many}"
        if self.search == "grid" and ranges:
            yield f"search grid requires lists, got a range for {', '.join(ranges)}; {take}"
        elif self.num_jobs > MAX_JOBS:
            yield f"search grid must give at most {MAX_JOBS} jobs, got {self.num_jobs}; {take}"
        data_parameters = self._data_parameters()
        if data_parameters:
            yield (
                "parameters must not change the rows that measure jobs, got "
                f"{', '.join(data_parameters)}; set data.validation, or a task under eval and its "
                "metric"
            )

    def _data_parameters(self) -> list[str]:
        """Parameters whose values decide on which rows the metric is measured."""
        data = self.job.get("data", {})
        section = "data"
        if self.metric.endswith("/accuracy"):  # of a task under eval
            section = "eval"
        elif isinstance(data, dict) and data.get("validation") and "data" not in self.parameters:
            section = "data.validation"
        return [path for path in self.parameters if f"{path}.".startswith(f"{section}.")]

    def job_name(self, number: int, combination: Mapping[str, Any]) -> str:
        """Name of a job: `job`'s, its number, and its values as far as there is room."""
        values = map(format_drawn, combination.values())
        safe = (re.sub("[^A-Za-z0-9.-]+", "_", value).strip("_")[:24] for value in values)
        numbered = f"{self.job.get('name') or 'sweep'}-{number:03}"
        return "-".join([numbered, *filter(None, safe)])[:100].rstrip("-._")

    @property
    def num_jobs(self) -> int:
        if self.search == "grid":
            return math.prod(map(len, self.parameters.values()))
        return self.search.random or self.search.tpe or 0

    @property
    def num_concurrent(self) -> int:
        is_tpe = self.search != "grid" and self.search.tpe is not None
        default = TPE_CONCURRENT_JOBS if is_tpe else self.num_jobs
        return min(self.num_jobs, self.max_concurrent or default)

    def share_of_concurrent(self, number: int, size: int) -> int:
        """How many jobs one of several workers trains at once; unasked, none of them is idle."""
        most = self.num_concurrent if self.max_concurrent else max(self.num_concurrent, size)
        return (most + size - 1 - number) // size

    @property
    def search_kind(self) -> dict[str, Any]:
        """What decides which combinations are drawn, however many."""
        if self.search == "grid":
            return {"kind": "grid"}
        return {"kind": "tpe" if self.search.tpe else "random", "seed": self.search.seed}

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {path: distribution_of(values) for path, values in self.parameters.items()}

    def combinations(self) -> list[dict[str, Any]]:
        """Those known beforehand, which TPE's later ones are not; a grid's last changes fastest."""
        if self.search == "grid":
            labels = [map(json.dumps, values) for values in self.parameters.values()]
            return [dict(zip(self.parameters, drawn, strict=True)) for drawn in product(*labels)]
        optuna, distributions = load_optuna(), self.distributions
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.search.seed))
        number = self.search.random or min(self.num_jobs, TPE_STARTUP_JOBS)
        return [study.ask(distributions).params for _ in range(number)]


def load_optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "sweep requires Optuna, which is not installed; run: pip install 'loraloom[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def format_drawn(drawn: str | int | float) -> str:
    value = parameter_value(drawn)
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def parameter_value(drawn: str | int | float) -> Any:
    """The value that Optuna means: of a list it has the JSON text; a real number is rounded."""
    if isinstance(drawn, str):
        return json.loads(drawn)
    return float(f"{drawn:.4g}") if isinstance(drawn, float) else drawn
