"""What a sweep tries: the `sweep:` section of a run file.

    sweep:
      job: {adapter: {method: lora, rank: 8}, data: {...}, train: {...}}
      parameters:
        train.learning_rate: [1e-4, 3e-4, 1e-3]
        adapter.rank: [4, 16]

Every combination is a job of its own, `<name of the job>-000` and so on.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from loraloom.config.faults import value_fault
from loraloom.config.fields import CheckInfo, StrictModel, check_name
from loraloom.config.overrides import set_setting
from loraloom.errors import ConfigError

MAX_JOBS = 512
TEMPLATE_NAME = "sweep"
"""What jobs are called by whose template has no name."""

RangeKind = Literal["uniform", "log_uniform", "int_uniform"]
Values = tuple[Any, ...]
Range = dict[RangeKind, tuple[int | float, int | float]]
Parameter = Values | Range
"""Values to try, or a range to draw from."""

_DRAWS_PER_JOB = 100
_DIGITS = 4


class RandomSearch(StrictModel):
    """Draw some combinations."""

    random: int = Field(ge=1, le=MAX_JOBS)
    """How many."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws. A larger number of them begins with the same ones."""


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

    def rungs_of(self, total_steps: int) -> tuple[int, ...]:
        """The rungs of a job of so many steps; at its last step there is nothing left to save."""
        rungs = self.rungs
        if rungs is None:
            rungs = tuple(_powers(self.min_steps or 1, self.reduction_factor, total_steps))
        return tuple(rung for rung in rungs if rung < total_steps)

    def check_reached(self, total_steps: Sequence[int]) -> None:
        """Check that the jobs are long enough.

        Raises:
            ConfigError: If no job is longer than a rung.
        """
        longest = max(total_steps, default=0)
        unused = self.rungs is not None and self.rungs[-1] >= longest
        if unused or not self.rungs_of(longest):
            setting = "min_steps" if self.rungs is None else "rungs"
            given = self.min_steps if self.rungs is None else list(self.rungs)
            raise ConfigError(
                f"early_stopping.asha.{setting} must be below the jobs' {longest} steps, "
                f"got {given}"
            )


class SweepStoppingConfig(StrictModel):
    """How jobs of a sweep are stopped before their end."""

    asha: AshaConfig
    """Successive halving."""


class SweepConfig(StrictModel):
    """Many jobs from one: each with other values of some settings."""

    job: str | dict[str, Any]
    """Settings of a job; or the name of one of `jobs`, which the sweep's then take the place of."""
    parameters: dict[str, Parameter]
    """Settings of the job, train.learning_rate say, and the values of each: a list; or, for random
    search, a range: {uniform: [low, high]}, {log_uniform: ...}, {int_uniform: ...}."""
    search: Literal["grid"] | RandomSearch = Field(default="grid", validate_default=True)
    """grid (all combinations) or {random: how many, seed: 0}."""
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
            _check_template_name(job.get("name", TEMPLATE_NAME))
        return job

    @field_validator("parameters", mode="before")
    @classmethod
    def _check_parameters(cls, parameters: Any) -> Any:
        if not isinstance(parameters, dict) or not parameters:
            raise ValueError(f"parameters must map settings to their values, got {parameters!r}")
        checked: dict[str, Any] = {}
        faults: list[str] = []
        for path, values in parameters.items():
            try:
                checked[path] = _checked_values(values)
            except ValueError as error:
                faults.append(f"parameters.{path} {error}")
        faults += _overlaps([path for path in parameters if isinstance(path, str)])
        _raise(faults)
        return checked

    @field_validator("search", mode="before")
    @classmethod
    def _check_search(cls, search: Any, info: CheckInfo) -> Any:
        if isinstance(search, dict):
            search = RandomSearch.model_validate(search)
        elif search != "grid" and not isinstance(search, RandomSearch):
            raise ValueError(
                f"search must be grid or {{random: how many, seed: 0}}, got {search!r}"
            )
        if "parameters" in info.data:
            _check_number(info.data["parameters"], search)
        return search

    def combinations(self) -> list[dict[str, Any]]:
        """The values of the parameters of each job."""
        if self.search == "grid":
            return list(_grid(self.parameters))
        return _draw(self.parameters, self.search)

    def expand(self, template: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The jobs' settings, as a run file would have them.

        Args:
            template: Settings of the job that they vary.

        Raises:
            ConfigError: If a parameter's path leads into something that has no settings.
        """
        return [
            _job_settings(template, values, number)
            for number, values in enumerate(self.combinations())
        ]


def format_value(value: Any) -> str:
    """A parameter's value as tables show it."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else json.dumps(value)


def format_values(values: Mapping[str, Any]) -> str:
    """Parameters as `train.learning_rate=0.0001 adapter.rank=8`."""
    return " ".join(f"{path}={format_value(value)}" for path, value in values.items())


def _check_template_name(name: Any) -> None:
    try:
        check_name(f"{name}-000")
    except ConfigError as error:
        raise ValueError(f"job.{error}") from None


def _job_settings(
    template: Mapping[str, Any], values: Mapping[str, Any], number: int
) -> dict[str, Any]:
    settings: Any = dict(template)
    for path, value in values.items():
        settings = set_setting(settings, path, value, origin="parameters.")
    return {**settings, "name": f"{template.get('name', TEMPLATE_NAME)}-{number:03}"}


def _powers(first: int, factor: int, stop: int) -> Iterator[int]:
    while first < stop:
        yield first
        first *= factor


def _checked_values(values: Any) -> Parameter:
    """Check one parameter's values; {choice: [...]} is a list by another name."""
    if isinstance(values, dict) and list(values) == ["choice"]:
        values = values["choice"]
    if isinstance(values, list | tuple):
        return _checked_list(values)
    if isinstance(values, dict) and len(values) == 1:
        ((kind, bounds),) = values.items()
        if kind in get_args(RangeKind):
            _check_bounds(kind, bounds)
            return {kind: (bounds[0], bounds[1])}
    kinds = ", ".join(f"{{{kind}: [low, high]}}" for kind in get_args(RangeKind))
    raise ValueError(f"must be a list of values, or one of {kinds}, got {values!r}")


def _checked_list(values: Sequence[Any]) -> Values:
    if not values:
        raise ValueError("must be a list of one value or more, got none")
    repeated = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if repeated is not None:
        raise ValueError(f"must have each value once, got {format_value(repeated)} again")
    return tuple(values)


def _check_bounds(kind: str, bounds: Any) -> None:
    number = int if kind == "int_uniform" else int | float
    is_pair = isinstance(bounds, list | tuple) and len(bounds) == 2
    if not is_pair or not all(
        isinstance(one, number) and not isinstance(one, bool) and math.isfinite(one)
        for one in bounds
    ):
        what = "whole numbers" if kind == "int_uniform" else "numbers"
        raise ValueError(f"must be {{{kind}: [low, high]}} with two {what}, got {bounds!r}")
    low, high = bounds
    if low >= high or (kind == "log_uniform" and low <= 0):
        positive = "0 < low" if kind == "log_uniform" else "low"
        raise ValueError(f"must be {{{kind}: [low, high]}} with {positive} < high, got {bounds!r}")


def _overlaps(paths: Sequence[str]) -> list[str]:
    """A fault for each parameter inside another one."""
    return [
        f"parameters.{inner} must not be inside another parameter, {outer}"
        for inner in paths
        for outer in paths
        if inner.startswith(f"{outer}.")
    ]


def _raise(faults: Sequence[str]) -> None:
    if faults:
        raise ValidationError.from_exception_data(
            "parameters", [value_fault((), one) for one in faults]
        )


def _check_number(parameters: Mapping[str, Parameter], search: Any) -> None:
    """Check that a search finds neither too few nor too many combinations."""
    ranges = [path for path, values in parameters.items() if isinstance(values, dict)]
    if search == "grid" and ranges:
        raise ValueError(
            f"search grid needs a list for each parameter, got a range for {', '.join(ranges)}; "
            "take search: {random: how many}"
        )
    if ranges:
        return
    number = math.prod(map(len, parameters.values()))
    if search == "grid" and number > MAX_JOBS:
        factors = " × ".join(str(len(values)) for values in parameters.values())
        raise ValueError(
            f"search grid must give at most {MAX_JOBS} jobs, got {factors} = {number}; "
            "take search: {random: how many}"
        )
    if search != "grid" and search.random > number:
        raise ValueError(
            f"search.random must be at most the {number} combinations of the parameters, "
            f"got {search.random}"
        )


def _grid(parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Any]]:
    """All combinations; the last parameter changes fastest."""
    for values in product(*parameters.values()):
        yield dict(zip(parameters, values, strict=True))


def _draw(parameters: Mapping[str, Parameter], search: RandomSearch) -> list[dict[str, Any]]:
    """Draw combinations that differ."""
    drawn: list[dict[str, Any]] = []
    for number in range(_DRAWS_PER_JOB * search.random):
        values = {
            path: _draw_value(choices, random.Random(f"{search.seed} {number} {path}").random())
            for path, choices in parameters.items()
        }
        if values not in drawn:
            drawn.append(values)
        if len(drawn) == search.random:
            return drawn
    raise ConfigError(
        f"search.random must not be above what the parameters can give, got {search.random} "
        f"and only {len(drawn)} different combinations"
    )


def _draw_value(choices: Parameter, place: float) -> Any:
    """The value at a place in [0, 1)."""
    if not isinstance(choices, dict):
        return choices[int(place * len(choices))]
    ((kind, (low, high)),) = choices.items()
    if kind == "int_uniform":
        return int(low) + int(place * (int(high) - int(low) + 1))
    if kind == "log_uniform":
        value = math.exp(math.log(low) + place * (math.log(high) - math.log(low)))
    else:
        value = low + place * (high - low)
    return float(f"{value:.{_DIGITS}g}")
