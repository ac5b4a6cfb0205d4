"""What a run file says: one base model and the jobs that share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    ByteSize,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails

from loraloom.config.adapter import AdapterConfig
from loraloom.config.data import (
    DataConfig,
    Scoring,
    TaskReference,
    check_task_path,
    default_scoring,
    task_name,
)
from loraloom.config.faults import describe_faults, describe_unknown_setting, value_fault
from loraloom.config.fields import AttnImplementation, CheckInfo, Dtype, StrictModel, check_device
from loraloom.config.names import check_name
from loraloom.config.optimization import SCHEDULERS_ON_METRIC
from loraloom.config.sweep import SweepConfig, format_values
from loraloom.config.train import TrainConfig


class EvaluationConfig(StrictModel):
    """A choice task that is scored while a job runs and at its end."""

    task: TaskReference
    """Choice task to score: its name, or the .yaml file of a task of your own."""
    path: str | None = Field(default=None, min_length=1)
    """Directory that holds its data, or a directory of such directories; None for the hub."""
    split: str = Field(default="validation", min_length=1)
    """Split to score. Test splits are reported, they never select the weights."""
    scoring: Scoring | None = Field(default=None, validate_default=True)
    """Score the choice's label or its own text; label by default, a task file has its own."""
    limit: int | None = Field(default=None, ge=1)
    """Score the first so many questions only."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str | None, info: CheckInfo) -> str | None:
        return check_task_path(path, info.data.get("task"))

    @field_validator("scoring")
    @classmethod
    def _fill_in_scoring(cls, scoring: Scoring | None, info: CheckInfo) -> Scoring | None:
        return scoring or default_scoring(info.data.get("task"))

    @property
    def metric(self) -> str:
        """Name of the result in metrics.jsonl."""
        return f"eval/{task_name(self.task)}/accuracy"


class JobConfig(StrictModel):
    """An adapter with its data and hyperparameters."""

    name: str
    """Name of the job, of its adapter and of their directory in output_dir."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of the data, dropout and jitter."""
    priority: float = Field(default=1.0, gt=0)
    """Share of the computed tokens, against other jobs', where max_tokens_per_step bounds steps."""
    adapter: AdapterConfig
    """Method and size of the adapter."""
    start_from: str | None = Field(default=None, min_length=1)
    """Adapter to start from, by directory or hub id, of the same method and size; null for new."""
    data: DataConfig
    """What the job learns from."""
    train: TrainConfig
    """How it learns."""
    eval: tuple[EvaluationConfig, ...] = Field(default=(), validate_default=True)
    """Choice tasks to score every train.eval_steps, and at the end."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("eval")
    @classmethod
    def _check_tasks_differ(
        cls, evaluations: tuple[EvaluationConfig, ...]
    ) -> tuple[EvaluationConfig, ...]:
        tasks = [task_name(evaluation.task) for evaluation in evaluations]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"eval must name each task once, got {', '.join(tasks)}")
        return evaluations

    @field_validator("eval")
    @classmethod
    def _check_evaluated(
        cls, evaluations: tuple[EvaluationConfig, ...], info: CheckInfo
    ) -> tuple[EvaluationConfig, ...]:
        if "train" in info.data and "data" in info.data:
            _check_metrics(info.data["train"], info.data["data"], evaluations)
        return evaluations

    @field_validator("train")
    @classmethod
    def _check_objective(cls, train: TrainConfig, info: CheckInfo) -> TrainConfig:
        if "data" in info.data:
            _check_fits_objective(info.data["data"], train)
        return train

    @property
    def selection_metric(self) -> str | None:
        """The metric that chooses the best weights; None: nothing is held out, the last are kept.

        It is early stopping's metric, else the loss on held-out rows, else the first evaluation
        that is not on a test split.
        """
        if self.train.early_stopping is not None:
            return self.train.early_stopping.metric
        return next(iter(self.selecting_metrics), None)

    @property
    def selecting_metrics(self) -> list[str]:
        """Metrics that the job measures outside test splits."""
        return _selecting_metrics(self.train, self.data, self.eval)


def _check_fits_objective(data: DataConfig, train: TrainConfig) -> None:
    """Check that pairs are learnt from by an objective for pairs, and nothing else by it."""
    objective, has_pairs = train.objective.name, train.learns_from_pairs
    held_out = () if data.validation is None else (data.validation,)
    for data_format in (source.format for source in (*data.sources, *held_out)):
        if not has_pairs and data_format == "preference":
            raise ValueError(
                "train.objective must be dpo or cpo for data of format preference, got sft; to "
                "learn the chosen answers take format instruction with fields "
                "{instruction: prompt, output: chosen}"
            )
        if has_pairs and data_format not in ("preference", None):
            raise ValueError(
                f"train.objective {objective} needs pairs of answers: a task, or a dataset of "
                f"format preference, got format {data_format}"
            )


def _selecting_metrics(
    train: TrainConfig, data: DataConfig, evaluations: Sequence[EvaluationConfig]
) -> list[str]:
    """Metrics that may choose weights: a test split must not."""
    held_out = ["eval/loss"] if data.has_validation else []
    if data.has_validation and train.learns_from_pairs:
        held_out += ["eval/rewards/accuracies", "eval/rewards/margins"]
    return held_out + [item.metric for item in evaluations if item.split != "test"]


def _check_metrics(
    train: TrainConfig, data: DataConfig, evaluations: Sequence[EvaluationConfig]
) -> None:
    """Check that what waits for an evaluation gets one."""
    give = "give data.validation_fraction, data.validation or eval"
    selecting = _selecting_metrics(train, data, evaluations)
    if train.eval_steps is not None and not (selecting or evaluations):
        raise ValueError(f"train.eval_steps has nothing to evaluate; {give}")
    if train.lr_scheduler in SCHEDULERS_ON_METRIC and not (selecting and train.eval_steps):
        raise ValueError(
            f"train.lr_scheduler {train.lr_scheduler} moves after evaluations only; "
            f"give train.eval_steps, and {give}"
        )
    if train.early_stopping is not None and train.early_stopping.metric not in selecting:
        raise ValueError(
            f"train.early_stopping.metric must be one that the job measures outside test splits "
            f"({', '.join(selecting) or 'none'}), got {train.early_stopping.metric!r}"
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


class RunConfig(StrictModel):
    """One base model and the jobs that share it."""

    base_model: str = Field(min_length=1)
    """Hub id, directory or .gguf file of a causal language model, or smollm2-135m."""
    dtype: Dtype = "float32"
    """Number format of the base model. Adapters are always kept in float32."""
    device: str = "auto"
    """auto (an accelerator where there is one), cpu, cuda, cuda:0, xpu, mps."""
    attn_implementation: AttnImplementation | None = None
    """How transformers computes attention; null for its own choice."""
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

    @field_validator("dtype")
    @classmethod
    def _check_dtype(cls, dtype: Dtype) -> Dtype:
        if dtype == "float16":
            raise ValueError(
                "dtype must be float32 or bfloat16 in training, got float16: without loss scaling "
                "small gradients become zero; use bfloat16"
            )
        return dtype

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        return check_device(device)

    @field_validator("attn_implementation")
    @classmethod
    def _check_attention(
        cls, implementation: AttnImplementation | None, info: CheckInfo
    ) -> AttnImplementation | None:
        if implementation == "flash_attention_2" and info.data.get("dtype") == "float32":
            raise ValueError(
                "attn_implementation flash_attention_2 computes in 16 bits only; "
                "set dtype: bfloat16 or take sdpa"
            )
        return implementation

    @field_validator("jobs", mode="wrap")
    @classmethod
    def _check_names_differ(cls, jobs: Any, handler: Callable[[Any], Any]) -> tuple[JobConfig, ...]:
        """Look at the names first, so that they are reported along with the jobs' own faults."""
        faults = _repeated_name_faults(jobs)
        try:
            checked = handler(jobs)
        except ValidationError as error:
            faults += [_as_fault(detail) for detail in error.errors()]
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
            _check_trials(sweep, jobs)
        elif not jobs and (info.context or {}).get("needs_jobs", True):
            raise ValueError("jobs must be a list of 1 or more, or sweep must be given")
        return sweep

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The jobs of the sweep."""
        if self.sweep is None:
            return ()
        settings = self.sweep.expand(_template(self.sweep, self.jobs))
        return tuple(
            Trial(JobConfig.model_validate(job), parameters)
            for job, parameters in zip(settings, self.sweep.combinations(), strict=True)
        )

    @property
    def all_jobs(self) -> tuple[JobConfig, ...]:
        """The jobs that train: those of the sweep after the others, without its template."""
        template = None if self.sweep is None else self.sweep.job
        others = [job for job in self.jobs if job.name != template]
        return (*others, *(trial.job for trial in self.trials))


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


def _check_trials(sweep: SweepConfig, jobs: Sequence[JobConfig]) -> None:
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


def _as_fault(details: ErrorDetails) -> InitErrorDetails:
    fault: InitErrorDetails = {
        "type": details["type"],
        "loc": details["loc"],
        "input": details["input"],
    }
    if "ctx" in details:
        fault["ctx"] = details["ctx"]
    return fault
