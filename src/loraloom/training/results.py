"""What became of a job: result.json, and the same in checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from loraloom.durable import write_json

RESULT_FILE = "result.json"
Status = Literal["finished", "stopped early", "stopped", "failed"]


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
        padding_share: Padding, as a share of the computed tokens.
        weights: Which weights the adapter's files hold.
        metrics: Evaluation of those weights.
        best: The metric that selects weights, its best value and the step of it.
        last_metrics: The last evaluation.
        data: A line for each source of data.
        seconds: Wall time of the run until the job's end, in which other jobs trained as well.
        peak_memory_bytes: Peaks of the process (`rss`) and of the accelerator, until then.
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
    weights: Literal["best", "last"]
    metrics: dict[str, float]
    best: dict[str, Any] | None
    last_metrics: dict[str, float]
    data: tuple[str, ...]
    seconds: float
    peak_memory_bytes: dict[str, int]
    environment: dict[str, Any]
    directory: str = ""
    stop_reason: str | None = None
    warnings: tuple[str, ...] = ()

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    def write(self, directory: Path) -> None:
        write_json(directory / RESULT_FILE, asdict(self))
