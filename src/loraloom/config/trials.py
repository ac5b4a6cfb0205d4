"""The jobs of a sweep: a job's settings with those that the sweep varies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from loraloom.config.faults import describe_faults, describe_unknown_setting, value_fault
from loraloom.config.job import JobConfig
from loraloom.config.sweep import SweepConfig, format_values


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


def expand_trials(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> tuple[Trial, ...]:
    """Return the jobs of a sweep that was checked, in its order.

    Args:
        sweep: What varies.
        jobs: Those beside it, one of which may be its template.
    """
    settings = sweep.expand(_template(sweep, jobs))
    return tuple(
        Trial(JobConfig.model_validate(job), parameters)
        for job, parameters in zip(settings, sweep.combinations(), strict=True)
    )


def _template(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> Mapping[str, Any]:
    """The settings that a sweep varies."""
    if not isinstance(sweep.job, str):
        return sweep.job
    named = next((job for job in jobs if job.name == sweep.job), None)
    if named is None:
        names = ", ".join(job.name for job in jobs) or "none"
        raise ValueError(
            f"job must be the settings of a job or the name of one of jobs ({names}), "
            f"got {sweep.job!r}"
        )
    return named.model_dump(mode="json", exclude_unset=True)


def check_trials(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> None:
    """Check every job of a sweep; a fault of all of them is told once."""
    template = _template(sweep, jobs)
    _raise_faults(_unknown_parameters(sweep))
    trials, faults = _build_trials(sweep, template)
    _raise_faults(faults)
    taken = {job.name.casefold() for job in jobs}
    _raise_faults(
        [
            f"job.name must give new names, but {job.name} is one of jobs"
            for job in trials
            if job.name.casefold() in taken
        ]
    )
    for job in trials:
        if sweep.metric not in job.selecting_metrics:
            raise ValueError(
                f"metric must be one that every job measures outside test splits "
                f"({', '.join(job.selecting_metrics) or 'none'}), got {sweep.metric!r}; give "
                "data.validation_fraction, data.validation or eval"
            )
    lengths = [job.train.max_steps for job in trials]
    known = [length for length in lengths if length is not None]
    if sweep.early_stopping is not None and len(known) == len(lengths):
        sweep.early_stopping.asha.check_reached(known)


def _unknown_parameters(sweep: SweepConfig) -> list[str]:
    faults = []
    for path in sweep.parameters:
        unknown = describe_unknown_setting(path, (JobConfig,))
        if unknown is not None:
            faults.append(f"parameters.{path} must be a setting of a job: {unknown}")
        elif path == "name":
            faults.append("parameters.name must be left out: the jobs are numbered")
    return faults


def _build_trials(
    sweep: SweepConfig, template: Mapping[str, Any]
) -> tuple[list[JobConfig], list[str]]:
    """The jobs that are right, and a line for each fault of the others."""
    jobs: list[JobConfig] = []
    faults: dict[str, list[str]] = {}
    settings = sweep.expand(template)
    for job, parameters in zip(settings, sweep.combinations(), strict=True):
        try:
            jobs.append(JobConfig.model_validate(job))
        except ValidationError as error:
            for fault in describe_faults(error, (JobConfig,)):
                faults.setdefault(fault, []).append(f"{job['name']}, {format_values(parameters)}")
    return jobs, [_describe_fault(*item, len(settings)) for item in faults.items()]


def _describe_fault(fault: str, jobs: Sequence[str], num_jobs: int) -> str:
    if len(jobs) == num_jobs:
        return f"job.{fault}"
    others = f" and {len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"{fault} ({jobs[0]}{others})"


def _raise_faults(faults: Sequence[str]) -> None:
    if faults:
        raise ValidationError.from_exception_data("sweep", [value_fault((), one) for one in faults])
