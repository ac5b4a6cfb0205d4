"""What a run file says: one base model and the jobs that share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_core import InitErrorDetails

from loraloom.config.faults import as_fault, describe_faults, value_fault
from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.config.job import JobConfig, when_registered
from loraloom.config.model import BaseModelConfig
from loraloom.config.paths import local_path
from loraloom.config.quantization import AnyQuantization
from loraloom.config.sweep import SweepConfig
from loraloom.config.trials import Trial, check_trials, make_trial
from loraloom.errors import ConfigError, shown


class ParallelConfig(StrictModel):
    """How the processes that torchrun starts share a base model."""

    base: Literal["replicated", "fsdp"] = "replicated"
    """replicated: each process has all of it; fsdp: each keeps a part of every layer's weights."""


class RunConfig(BaseModelConfig):
    """One base model and the jobs that share it."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How several processes share the base model; each computes a share of all jobs' rows."""
    output_dir: Path
    """Directory of the results, one directory a job in it."""
    max_tokens_per_step: int | None = Field(default=None, ge=1)
    """Most tokens of a fused forward, padding included; null: all jobs take part in each step."""
    keep_snapshots: int = Field(default=2, ge=1)
    """How many snapshots --resume may choose from; the newest whole one is taken."""
    memory_limit: ByteSize | None = None
    """Most memory of a training step, base model included: bytes or "20GB"; null: what is there."""
    trackers: tuple[Literal["jsonl", "tensorboard", "trackio", "wandb"], ...] = ("jsonl",)
    """Where metrics go. metrics.jsonl is always written."""
    jobs: tuple[JobConfig, ...] = ()
    """Adapters to train, all in the same steps."""
    sweep: SweepConfig | None = Field(default=None, validate_default=True)
    """A job in many versions, which train in the same steps as well."""

    @field_validator("output_dir", mode="before")
    @classmethod
    def _refuse_url(cls, output_dir: Any) -> Any:
        if isinstance(output_dir, str) and "://" in output_dir:
            raise ValueError(
                f"output_dir must be a directory, got the URL {shown(output_dir)}; mount a file "
                "system that all machines share (NFS, or JuiceFS on a bucket) and name a directory "
                "in it"
            )
        return output_dir

    @field_validator("output_dir")
    @classmethod
    def _check_output_dir(cls, output_dir: Path) -> Path:
        return local_path(output_dir, "output_dir")

    @field_validator("quantization")
    @classmethod
    def _check_compute_dtype(
        cls, quantization: AnyQuantization | None, info: CheckInfo
    ) -> AnyQuantization | None:
        computes_in_float16 = getattr(quantization, "bnb_4bit_compute_dtype", None) == "float16"
        if computes_in_float16 and info.data.get("dtype") != "float16":
            raise ValueError(
                "quantization.bnb_4bit_compute_dtype must be float32 or bfloat16 in training, got "
                "float16: without loss scaling, which comes with dtype: float16, small gradients "
                "become zero"
            )
        return quantization

    @field_validator("jobs", mode="wrap")
    @classmethod
    def _check_names_differ(cls, jobs: Any, handler: Callable[[Any], Any]) -> tuple[JobConfig, ...]:
        """Look at the names first, so that they are reported along with the jobs' own faults."""
        faults = _repeated_name_faults(jobs)
        try:
            checked = handler(jobs)
        except ValidationError as error:
            faults += map(as_fault, error.errors())
            raise ValidationError.from_exception_data("jobs", faults) from None
        if faults:
            raise ValidationError.from_exception_data("jobs", faults)
        return checked

    @field_validator("sweep")
    @classmethod
    def _check_sweep(cls, sweep: SweepConfig | None, info: CheckInfo) -> SweepConfig | None:
        if "jobs" not in info.data:
            return sweep
        jobs: Sequence[JobConfig] = info.data["jobs"]
        if sweep is not None:
            check_trials(sweep, jobs)
        elif not jobs and (info.context or {}).get("needs_jobs", True):
            raise ValueError("jobs must be a list of 1 or more, or sweep must be given")
        return sweep

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The jobs of the sweep, as far as they are known beforehand."""
        combinations = [] if self.sweep is None else self.sweep.combinations()
        return tuple(self.trial(*one) for one in enumerate(combinations))

    def trial(self, number: int, combination: Mapping[str, Any]) -> Trial:
        """A job of the sweep; see `make_trial`.

        Raises:
            ConfigError: If its values don't go together.
        """
        assert self.sweep is not None
        try:
            return make_trial(self.sweep, self.jobs, number, combination)
        except ValidationError as error:
            raise ConfigError("; ".join(describe_faults(error, (JobConfig,)))) from None

    @property
    def all_jobs(self) -> tuple[JobConfig, ...]:
        """The jobs that train: those of the sweep after the others, without its template."""
        template = None if self.sweep is None else self.sweep.job
        others = [job for job in self.jobs if job.name != template]
        return (*others, *(trial.job for trial in self.trials))

    @property
    def first_jobs(self) -> tuple[JobConfig, ...]:
        """The jobs that train from the beginning; others of the sweep join later."""
        num_first = 0 if self.sweep is None else self.sweep.num_concurrent
        later = {trial.name for trial in self.trials[num_first:]}
        return tuple(job for job in self.all_jobs if job.name not in later)


when_registered(lambda: RunConfig.model_rebuild(force=True))


def _repeated_name_faults(jobs: Any) -> list[InitErrorDetails]:
    """A fault for each job whose name an earlier one has, also where only the case differs."""
    names = [_raw_name(job) for job in jobs] if isinstance(jobs, list | tuple) else []
    seen: set[str] = set()
    faults: list[InitErrorDetails] = []
    for index, name in enumerate(names):
        if name is None:
            continue
        if name.casefold() in seen:
            reason = f"name must differ from those of the other jobs, got {name!r} again"
            faults.append(value_fault((index, "name"), reason))
        seen.add(name.casefold())
    return faults


def _raw_name(job: Any) -> str | None:
    """The name of a job that may not have been checked yet."""
    if isinstance(job, JobConfig):
        return job.name
    name = job.get("name") if isinstance(job, dict) else None
    return name if isinstance(name, str) else None
