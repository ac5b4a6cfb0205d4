"""What became of a job: result.json and the text of its model card."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter

from loraloom.adapters.base import BaseInfo
from loraloom.durable import write_json
from loraloom.formats.card import model_card
from loraloom.training.job import Job
from loraloom.training.step.batch import padding_share

RESULT_FILE = "result.json"

Weights = Literal["best", "last"]
Status = Literal["queued", "running", "finished", "stopped early", "stopped", "failed"]
"""Where a job is; a result has one of the last four."""


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Args:
        job: Its name.
        status: finished; stopped early (the metric no longer got better); stopped from outside;
            or failed.
        error: Why it failed.
        method: Title of its method: LoRA, MixLoRA, ...
        base_model: Name of the base model.
        num_parameters: Weights that were trained.
        steps: Steps done.
        epochs: Passes over the data.
        tokens: Real tokens learnt from.
        computed_tokens: Tokens that went through the model for them, with padding.
        padding_share: Of the computed tokens.
        weights: Which weights the adapter's files hold.
        metrics: Evaluation of those weights.
        best: The metric that selects weights, its best value and the step of it.
        last_metrics: The last evaluation.
        data: A line for each source of data.
        seconds: Wall time of the run until the job's end, in which other jobs trained as well.
        peak_memory_bytes: Of the process (`rss`) and of the accelerator, until then.
        environment: Versions, device, dtype, command.
        directory: Where the adapter's files are.
        stop_reason: Why it was stopped.
        warnings: What was said while it trained: routers that collapsed.
    """

    job: str
    status: Status
    error: str | None
    method: str
    base_model: str
    num_parameters: int
    steps: int
    epochs: float
    tokens: int
    computed_tokens: int
    padding_share: float
    weights: Weights
    metrics: dict[str, float]
    best: dict[str, Any] | None
    last_metrics: dict[str, float]
    data: tuple[str, ...]
    seconds: float
    peak_memory_bytes: dict[str, int]
    environment: dict[str, Any]
    directory: str = field(default="")
    stop_reason: str | None = None
    warnings: tuple[str, ...] = ()

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    def write(self, directory: Path) -> None:
        """Write result.json."""
        write_json(directory / RESULT_FILE, asdict(self))


_RESULT = TypeAdapter(JobResult)


def parse_result(values: Any) -> JobResult:
    """Make a result of what JSON has of it."""
    return _RESULT.validate_python(values)


def job_result(
    job: Job,
    base: BaseInfo,
    directory: Path,
    *,
    error: str | None = None,
    stop_reason: str | None = None,
    seconds: float,
    environment: Mapping[str, Any],
) -> JobResult:
    """Sum a job up."""
    position, selection = job.position, job.selection
    has_best, best = selection.step is not None, None
    if has_best:
        best = {"metric": selection.metric, "value": selection.value, "step": selection.step}
    last_metrics = position.metrics if position.evaluated_step == position.step else {}
    return JobResult(
        job=job.name,
        status=_status(job, error, stop_reason),
        error=error,
        method=job.config.adapter.title,
        base_model=base.name_or_path,
        num_parameters=sum(parameter.numel() for parameter in job.parameters.values()),
        steps=position.step,
        epochs=round(job.order.epochs_after(position.step), 4),
        tokens=position.tokens,
        computed_tokens=position.computed_tokens,
        padding_share=round(padding_share(position.tokens, position.computed_tokens), 4),
        weights="best" if has_best else "last",
        metrics=selection.metrics if has_best else last_metrics,
        best=best,
        last_metrics=last_metrics,
        data=job.training_set.report,
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory_bytes(),
        environment=dict(environment),
        directory=str(directory),
        stop_reason=stop_reason,
        warnings=tuple(job.collapse.warnings.values()),
    )


def _status(job: Job, error: str | None, stop_reason: str | None) -> Status:
    if error is not None:
        return "failed"
    if stop_reason is not None:
        return "stopped"
    return "stopped early" if job.position.step < job.total_steps else "finished"


def result_card(result: JobResult, job: Job, base: BaseInfo) -> str:
    """Write the README.md of a trained adapter."""
    which = f"{result.weights} weights of {result.steps} steps"
    if result.best is not None:
        which += f", chosen by {result.best['metric']} after step {result.best['step']}"
    rows = [f"| {name} | {value:.4f} |" for name, value in result.metrics.items()]
    table = ["", "| metric | value |", "|---|---|", *rows] if rows else []
    training = f"{result.epochs:g} epochs, {result.tokens:,} tokens, seed {job.config.seed}"
    return model_card(
        job.adapter.config,
        base,
        name=result.job,
        data="\n".join(f"- {line}" for line in result.data),
        results="\n".join([f"The {which} ({training}).", *table]),
        prompt=job.adapter.prompt,
    )


def describe_environment(
    device: torch.device, dtype: torch.dtype, command: str, num_ranks: int = 1
) -> dict[str, Any]:
    """Say with what a run was made."""
    packages = ("loraloom", "torch", "transformers", "safetensors")
    return {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "platform": platform.platform(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": num_ranks,
        "command": command,
    }


def peak_memory_bytes() -> dict[str, int]:
    """Return the high-water marks of this process's resident memory and of the accelerator's."""
    peak = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        peak["cuda"] = sum(map(torch.cuda.max_memory_allocated, devices))
    return peak
