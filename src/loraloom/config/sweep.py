"""What a sweep tries: the `sweep:` section of a run file.

    sweep:
      job: {adapter: {method: lora, rank: 8}, data: {...}, train: {...}}
      parameters:
        train.learning_rate: {log_uniform: [1e-5, 1e-2]}
        adapter.rank: [4, 16]
      search: {tpe: 30}

Every combination is a job of its own, called after its number and its values:
`sweep-000-0.0001-4` and so on. Optuna draws them, and has the values of a list as JSON text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, product, repeat, takewhile
from operator import mul
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from loraloom.config.faults import value_fault
from loraloom.config.fields import CheckInfo, StrictModel, check_name
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MAX_JOBS = 512
TEMPLATE_NAME = "sweep"
"""What jobs are called by whose template has no name."""
TPE_STARTUP_JOBS = 10
"""Random jobs that TPE begins with, as many as Optuna's sampler wants to have seen."""
TPE_CONCURRENT_JOBS = 4

RangeKind = Literal["uniform", "log_uniform", "int_uniform"]
Values = tuple[Any, ...]
Range = dict[RangeKind, tuple[int | float, int | float]]
Parameter = Values | Range
"""Values to try, or a range to draw from."""

MAX_JOB_NAME = 100
MAX_VALUE_NAME = 24
"""Characters of a job's name, and of a value in it."""

_UNSAFE = re.compile(r"[^A-Za-z0-9.-]+")
_DRAWS_PER_JOB = 100
_DIGITS = 4


class RandomSearch(StrictModel):
    """Draw some combinations."""

    random: int = Field(ge=1, le=MAX_JOBS)
    """How many."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draws. A larger number of them begins with the same ones."""


class TpeSearch(StrictModel):
    """Learn from the jobs that ended which combinations to try, by Optuna's TPE sampler."""

    tpe: int = Field(ge=1, le=MAX_JOBS)
    """How many. The first ten are random."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draws."""


class AshaConfig(StrictModel):
    """Successive halving: only the best of those that reached a rung go on after it.

    Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning,
    arXiv:1810.05934, in the form that stops jobs.
    """

    reduction_factor: int = Field(default=3, ge=2)
    """One in so many goes on after a rung."""
    min_steps: int | None = Field(default=None, ge=1)
    """The first rung; the others are this times the powers of reduction_factor. Or give rungs."""
    rungs: tuple[int, ...] | None = Field(default=None, min_length=1, validate_default=True)
    """Steps after which jobs are compared; or give min_steps."""

    @field_validator("rungs")
    @classmethod
    def _check_rungs(cls, rungs: tuple[int, ...] | None, info: CheckInfo) -> tuple[int, ...] | None:
        if "min_steps" not in info.data:
            return rungs
        if (rungs is None) == (info.data["min_steps"] is None):
            raise ValueError("rungs or min_steps must be given, one of them")
        if rungs is not None and (rungs[0] < 1 or list(rungs) != sorted(set(rungs))):
            raise ValueError(f"rungs must be steps that rise from 1 or more, got {list(rungs)}")
        return rungs


class HyperbandConfig(StrictModel):
    """Successive halving in several brackets, each with a later first rung than the one before.

    Source: Li et al. 2018, Hyperband, JMLR 18(185).
    """

    reduction_factor: int = Field(default=3, ge=2)
    """One in so many goes on after a rung."""
    min_steps: int = Field(ge=1)
    """The first rung of the first bracket."""


class MedianConfig(StrictModel):
    """Stop a job whose best value is worse than the median of finished jobs at the same step."""

    min_jobs: int = Field(default=5, ge=1)
    """Jobs that must have trained to their end before any is stopped."""
    min_steps: int = Field(default=1, ge=1)
    """No job is stopped before this step."""


class SweepStoppingConfig(StrictModel):
    """How jobs of a sweep are stopped before their end: one of these."""

    asha: AshaConfig | None = None
    """Successive halving."""
    hyperband: HyperbandConfig | None = None
    """Successive halving that begins early for some jobs and late for others."""
    median: MedianConfig | None = Field(default=None, validate_default=True)
    """Comparison with finished jobs."""

    @field_validator("median")
    @classmethod
    def _check_one(cls, median: MedianConfig | None, info: CheckInfo) -> MedianConfig | None:
        rules = [*info.data.values(), median]
        if len(rules) == len(cls.model_fields) and len(rules) - rules.count(None) != 1:
            raise ValueError("early_stopping must be one of asha, hyperband and median")
        return median

    def rungs(self, total_steps: int) -> tuple[int, ...]:
        """The rungs of a job of so many steps; at its last step there is nothing left to save."""
        halving = self.asha or self.hyperband
        if halving is None:
            return ()
        powers = accumulate(repeat(halving.reduction_factor), mul, initial=halving.min_steps or 1)
        given = None if self.asha is None else self.asha.rungs
        return tuple(takewhile(lambda rung: rung < total_steps, given or powers))

    def check_reached(self, longest: int) -> None:
        """Check that the longest job is long enough."""
        (rule,) = self.model_dump(exclude_none=True).values()
        if max(rule.get("rungs", [rule.get("min_steps")])) >= longest:
            raise ConfigError(
                f"early_stopping must act before the last of the jobs' {longest} steps, got {rule}"
            )


class SweepConfig(StrictModel):
    """Many jobs from one: each with other values of some settings."""

    job: str | dict[str, Any]
    """Settings of a job; or the name of one of `jobs`, which the sweep's then take the place of."""
    parameters: dict[str, Parameter]
    """Settings of the job, train.learning_rate say, and the values of each: a list; or, unless the
    search is a grid, a range: {uniform: [low, high]}, {log_uniform: ...}, {int_uniform: ...}."""
    search: Literal["grid"] | RandomSearch | TpeSearch = Field(
        default="grid", validate_default=True
    )
    """grid (all combinations), {random: how many, seed: 0} or {tpe: how many, seed: 0}."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Most jobs that train at once; null: all of a grid or a random search, 4 of tpe."""
    metric: str = "eval/loss"
    """Metric that ranks the jobs, by its name in metrics.jsonl."""
    early_stopping: SweepStoppingConfig | None = None
    """Stop jobs that do badly; null to train all to their end."""

    @field_validator("job", mode="before")
    @classmethod
    def _check_job(cls, job: Any) -> str | dict[str, Any]:
        if not isinstance(job, str | dict):
            raise ValueError(f"job must be settings of a job or the name of one, got {job!r}")
        if isinstance(job, dict):
            try:
                check_name(f"{job.get('name') or TEMPLATE_NAME}-000")
            except ConfigError as error:
                raise ValueError(f"job.{error}") from None
        return job

    @field_validator("parameters", mode="before")
    @classmethod
    def _check_parameters(cls, parameters: Any) -> Any:
        if not isinstance(parameters, dict) or not parameters:
            raise ValueError(f"parameters must map settings to their values, got {parameters!r}")
        checked, faults = {}, []
        for path, values in parameters.items():
            try:
                checked[path] = _checked_values(values)
            except ValueError as error:
                faults.append(f"parameters.{path} {error}")
        faults += [
            f"parameters.{inner} must not be inside another parameter, {outer}"
            for inner, outer in product(parameters, parameters)
            if str(inner).startswith(f"{outer}.")
        ]
        raise_faults(faults)
        return checked

    @field_validator("search", mode="before")
    @classmethod
    def _check_search(cls, search: Any, info: CheckInfo) -> Any:
        if isinstance(search, dict):
            search = (TpeSearch if "tpe" in search else RandomSearch).model_validate(search)
        elif search != "grid" and not isinstance(search, RandomSearch | TpeSearch):
            choices = "grid, {random: how many, seed: 0} or {tpe: how many, seed: 0}"
            raise ValueError(f"search must be {choices}, got {search!r}")
        if search == "grid" and "parameters" in info.data:
            _check_grid(info.data["parameters"])
        return search

    def job_name(self, number: int, combination: Mapping[str, Any]) -> str:
        """Name of a job: the template's, its number, and its values as far as there is room."""
        values = (format_value(parameter_value(drawn)) for drawn in combination.values())
        safe = (_UNSAFE.sub("_", value).strip("_")[:MAX_VALUE_NAME] for value in values)
        name = "-".join([self._numbered(number), *filter(None, safe)])
        return name[:MAX_JOB_NAME].rstrip("-._")

    def owns(self, name: str) -> bool:
        """Whether a job of that name is one of the sweep's, also one that is not drawn yet."""
        own = (self._numbered(number).casefold() for number in range(self.num_jobs))
        return any(name.casefold() == one or name.casefold().startswith(f"{one}-") for one in own)

    def _numbered(self, number: int) -> str:
        template = self.job if isinstance(self.job, str) else self.job.get("name") or TEMPLATE_NAME
        return f"{template}-{number:03}"

    @property
    def num_jobs(self) -> int:
        """How many combinations are tried."""
        match self.search:
            case RandomSearch(random=number) | TpeSearch(tpe=number):
                return number
        return math.prod(map(len, self.parameters.values()))

    @property
    def num_concurrent(self) -> int:
        """How many jobs train at once."""
        default = TPE_CONCURRENT_JOBS if isinstance(self.search, TpeSearch) else self.num_jobs
        return min(self.num_jobs, self.max_concurrent or default)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The parameters as Optuna has them."""
        return {path: _distribution(values) for path, values in self.parameters.items()}

    def combinations(self) -> list[dict[str, Any]]:
        """The combinations that are known beforehand, as Optuna has them: all but TPE's later ones.

        In a grid the last parameter changes fastest.
        """
        if self.search == "grid":
            labels = [map(json.dumps, values) for values in self.parameters.values()]
            return [dict(zip(self.parameters, one, strict=True)) for one in product(*labels)]
        number = self.num_jobs
        if isinstance(self.search, TpeSearch):
            number = min(number, TPE_STARTUP_JOBS)
        optuna, distributions = load_optuna(), self.distributions
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(self.search.seed))
        drawn: list[dict[str, Any]] = []
        for _ in range(_DRAWS_PER_JOB * number):
            combination = study.ask(distributions).params
            if combination not in drawn:
                drawn.append(combination)
            if len(drawn) == number:
                return drawn
        raise ConfigError(
            f"search must not be for more jobs than the parameters can give, got {number} and only "
            f"{len(drawn)} different combinations"
        )


def load_optuna() -> ModuleType:
    """Import Optuna, which then says nothing but warnings."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            "sweep needs Optuna, which is not installed: pip install 'loraloom[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def format_value(value: Any) -> str:
    """A parameter's value as tables show it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def format_values(values: Mapping[str, Any]) -> str:
    """Parameters as `train.learning_rate=0.0001 adapter.rank=8`."""
    return " ".join(f"{path}={format_value(value)}" for path, value in values.items())


def raise_faults(faults: Sequence[str]) -> None:
    """Raise faults, if there are any, in a way that gives each a line."""
    if faults:
        raise ValidationError.from_exception_data("sweep", [value_fault((), one) for one in faults])


def _checked_values(values: Any) -> Any:
    """Check one parameter's values."""
    match values:
        case [*choices] if choices:
            if not _is_json(choices):
                raise ValueError(f"must be values of JSON; put dates in quotes, got {values!r}")
            if all(one not in choices[:place] for place, one in enumerate(choices)):
                return tuple(choices)
        case {**ranges} if len(ranges) == 1:
            ((kind, bounds),) = ranges.items()
            if kind in get_args(RangeKind) and _are_bounds(kind, bounds):
                return {kind: tuple(bounds)}
    raise ValueError(
        "must be a list of values that differ, or a range with low < high: "
        "{uniform: [low, high]}, {log_uniform: [low, high]} above 0, {int_uniform: [low, high]} of "
        f"whole numbers, got {values!r}"
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _are_bounds(kind: str, bounds: Any) -> bool:
    number = int if kind == "int_uniform" else int | float
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        return False
    if not all(isinstance(one, number) and type(one) is not bool for one in bounds):
        return False
    return (0 if kind == "log_uniform" else -math.inf) < bounds[0] < bounds[1] < math.inf


def _check_grid(parameters: Mapping[str, Parameter]) -> None:
    """Check that there are neither too few nor too many combinations."""
    ranges = [path for path, values in parameters.items() if isinstance(values, dict)]
    if ranges:
        raise ValueError(
            f"search grid needs a list for each parameter, got a range for {', '.join(ranges)}; "
            "take search: {random: how many}"
        )
    number = math.prod(map(len, parameters.values()))
    if number > MAX_JOBS:
        raise ValueError(
            f"search grid must give at most {MAX_JOBS} jobs, got {number}; "
            "take search: {random: how many}"
        )


def _distribution(values: Parameter) -> BaseDistribution:
    distributions = load_optuna().distributions
    match values:
        case {"int_uniform": (low, high)}:
            return distributions.IntDistribution(low, high)
        case {"uniform": (low, high)}:
            return distributions.FloatDistribution(low, high)
        case {"log_uniform": (low, high)}:
            return distributions.FloatDistribution(low, high, log=True)
    return distributions.CategoricalDistribution([json.dumps(value) for value in values])


def parameter_value(drawn: str | int | float) -> Any:
    """The value that Optuna means: of a list it has the JSON text; a real number is rounded."""
    if isinstance(drawn, str):
        return json.loads(drawn)
    return float(f"{drawn:.{_DIGITS}g}") if isinstance(drawn, float) else drawn
