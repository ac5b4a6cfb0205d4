"""What became of a job: result.json, and the same in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict

RESULT_FILE = "result.json"
Status = Literal["finished", "stopped early", "stopped", "failed"]


@dataclass(frozen=True)
class JobResult:
    """What became of a job."""

    job: str
    status: Status  # stopped early: its metric no longer got better; stopped: from outside
    error: str | None  # why it failed
    method: str  # its title: LoRA, MixLoRA, ...
    base_model: str
    num_parameters: int  # that were trained
    steps: int
    epochs: float
    tokens: int  # real ones that it learnt from
    computed_tokens: int  # with padding
    padding_share: float  # of the computed tokens
    weights: Literal["best", "last"]  # in the adapter's files
    metrics: dict[str, float]  # an evaluation of those weights
    best: dict[str, Any] | None  # the metric that selects weights, its best value and the step
    last_metrics: dict[str, float]
    data: tuple[str, ...]  # a line for each source
    seconds: float  # wall time of the run until the job's end
    peak_memory_bytes: dict[str, int]  # of the process (`rss`) and the accelerator, until then
    environment: dict[str, Any]  # versions, device, dtype, command
    directory: str = ""
    stop_reason: str | None = None
    warnings: tuple[str, ...] = ()  # routers that collapsed
    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)
