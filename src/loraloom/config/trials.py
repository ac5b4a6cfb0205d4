"""The jobs of a sweep: a job's settings with those that the sweep varies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from loraloom.config.faults import describe_faults, describe_unknown_setting
from loraloom.config.job import JobConfig
from loraloom.config.overrides import set_setting
from loraloom.config.sweep import (
    SweepConfig,
    load_optuna,
    parameter_value,
    raise_faults,
)


@dataclass(frozen=True)
class Trial:
    """A job of a sweep.

    Args:
        job: Its settings.
        parameters: Those that the sweep varies, by their paths.
    """

    job: JobConfig
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.job.name


def make_trial(
    sweep: SweepConfig, jobs: Sequence[JobConfig], number: int, combination: Mapping[str, Any]
) -> Trial:
    """Make a job of a sweep."""
    settings: Any = _template(sweep, jobs)
    parameters = {path: parameter_value(drawn) for path, drawn in combination.items()}
    for path, value in parameters.items():
        settings = set_setting(settings, path, value, origin="parameters.")
    name = sweep.job_name(number, combination)
    return Trial(JobConfig.model_validate({**settings, "name": name}), parameters)


def check_trials(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> None:
    """Check the jobs of a sweep; a fault that several have is told once."""
    load_optuna()
    _template(sweep, jobs)
    raise_faults(list(_unknown_parameters(sweep)))
    tried: list[JobConfig] = []
    faults: list[str] = []
    for number, combination in enumerate(sweep.combinations()):
        try:
            tried.append(make_trial(sweep, jobs, number, combination).job)
        except ValidationError as error:
            faults += describe_faults(error, (JobConfig,))
    raise_faults([f"job.{fault}" for fault in dict.fromkeys(faults)])
    clashes = [job.name for job in jobs if sweep.owns(job.name)]
    raise_faults([f"job.name must give new names, but {name} is one of jobs" for name in clashes])
    for job in tried:
        if sweep.metric not in job.selecting_metrics:
            raise ValueError(
                f"metric must be one that every job measures outside test splits "
                f"({', '.join(job.selecting_metrics) or 'none'}), got {sweep.metric!r}; give "
                "data.validation_fraction, data.validation or eval"
            )
    stopping = sweep.early_stopping
    is_judged = all(job.train.eval_steps for job in tried)
    if stopping is not None and stopping.median is not None and not is_judged:
        raise ValueError("early_stopping.median judges evaluations; give train.eval_steps")
    lengths = [job.train.max_steps for job in tried]
    if stopping is not None and None not in lengths:
        stopping.check_reached(max(length or 0 for length in lengths))


def _template(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> Mapping[str, Any]:
    """The settings that a sweep varies."""
    if not isinstance(sweep.job, str):
        return sweep.job
    for job in jobs:
        if job.name == sweep.job:
            return job.model_dump(mode="json", exclude_unset=True)
    names = ", ".join(job.name for job in jobs) or "none"
    raise ValueError(
        f"job must be the settings of a job or the name of one of jobs ({names}), got {sweep.job!r}"
    )


def _unknown_parameters(sweep: SweepConfig) -> Iterator[str]:
    for path in sweep.parameters:
        unknown = describe_unknown_setting(path, (JobConfig,))
        if unknown is not None:
            yield f"parameters.{path} must be a setting of a job: {unknown}"
        elif path == "name":
            yield "parameters.name must be left out: the jobs are numbered"
