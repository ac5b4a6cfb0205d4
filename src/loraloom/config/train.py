"""How a job learns: the `train:` section of a job. A step is an optimizer step."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from loraloom.config.fields import CheckInfo, StrictModel
from loraloom.config.objective import ObjectiveConfig, SftConfig
from loraloom.config.optimizer import OptimizerConfig

LrScheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
"""The schedulers of transformers (SchedulerType)."""

SCHEDULERS_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""They take no warm-up."""

SCHEDULERS_ON_METRIC = ("reduce_lr_on_plateau", "greedy")
"""They move after each evaluation, by the metric that selects the weights."""


class EarlyStoppingConfig(StrictModel):
    """Stop when a metric no longer gets better."""

    metric: str = "eval/loss"
    """Metric to watch, by its name in metrics.jsonl: eval/loss, eval/<task>/accuracy, ..."""
    patience: int = Field(default=3, ge=1)
    """Evaluations in a row without a better value after which the job ends."""


class TrainConfig(OptimizerConfig):
    """How a job learns."""

    objective: ObjectiveConfig = Field(default_factory=SftConfig)
    """What the job minimises: sft (the default), or dpo or cpo on preference data."""
    lr_scheduler: LrScheduler = "linear"
    """A scheduler of transformers by name."""
    lr_scheduler_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the scheduler, for example `{num_cycles: 2}`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps over which the learning rate rises to its highest."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """The same as a share of all steps."""
    batch_size: int = Field(default=16, ge=1)
    """Rows in a step; with preference data, pairs of rows."""
    micro_batch_size: int = Field(
        default_factory=lambda fields: fields["batch_size"], ge=1, validate_default=True
    )
    """Rows that go through the model at once, batch_size by default; the gradient is the same."""
    num_epochs: int | None = Field(default=None, ge=1)
    """Passes over the data; or give max_steps."""
    max_steps: int | None = Field(default=None, ge=1, validate_default=True)
    """Steps after which the job ends; or give num_epochs."""
    max_length: int = Field(default=512, ge=2)
    """Longest row in tokens."""
    group_by_length: bool = False
    """Let examples of similar length share a step, for less padding; orders stay random."""
    packing: bool = False
    """Put several examples into a row of up to max_length tokens; nothing else changes."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the norm of the adapter's whole gradient to this; null for no clipping."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps; null for the end only."""
    eval_on_start: bool = False
    """Evaluate before the first step as well, to see where the job begins."""
    save_steps: int | None = Field(default=None, ge=1)
    """Keep what --resume needs every so many steps; null for evaluations and the end only."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop when a metric no longer gets better."""

    @field_validator("lr_scheduler_args")
    @classmethod
    def _check_scheduler_args(cls, args: dict[str, Any], info: CheckInfo) -> dict[str, Any]:
        scheduler = info.data.get("lr_scheduler")
        if args and scheduler in ("constant", "constant_with_warmup"):  # transformers ignores them
            raise ValueError(f"lr_scheduler_args must hold nothing for {scheduler}, got {args}")
        if reserved := sorted({"mode", "last_epoch"} & args.keys()):
            raise ValueError(f"lr_scheduler_args must not hold {reserved[0]}: the job sets it")
        return args

    @field_validator("warmup_steps", "warmup_ratio")
    @classmethod
    def _check_warmup(cls, warmup: int | float | None, info: CheckInfo) -> int | float | None:
        scheduler = info.data.get("lr_scheduler")
        if warmup and scheduler in SCHEDULERS_WITHOUT_WARMUP:
            advice = "use constant_with_warmup" if scheduler == "constant" else "remove it"
            raise ValueError(f"{info.field_name} has no effect on {scheduler}; {advice}")
        return warmup

    @field_validator("warmup_ratio")
    @classmethod
    def _check_one_warmup(cls, ratio: float | None, info: CheckInfo) -> float | None:
        if ratio is not None and info.data.get("warmup_steps") is not None:
            raise ValueError("warmup_ratio and warmup_steps exclude each other; give one")
        return ratio

    @field_validator("micro_batch_size")
    @classmethod
    def _check_micro_batch_size(cls, micro_batch_size: int, info: CheckInfo) -> int:
        batch_size = info.data.get("batch_size", micro_batch_size)
        if batch_size % micro_batch_size:
            raise ValueError(
                f"micro_batch_size must divide batch_size={batch_size}, got {micro_batch_size}"
            )
        return micro_batch_size

    @field_validator("max_steps")
    @classmethod
    def _check_one_length(cls, max_steps: int | None, info: CheckInfo) -> int | None:
        if "num_epochs" not in info.data:
            return max_steps
        num_epochs = info.data["num_epochs"]
        if max_steps is not None and num_epochs is not None:
            raise ValueError(
                "max_steps and num_epochs exclude each other, "
                f"got {max_steps} and {num_epochs}; give one"
            )
        if max_steps is None and num_epochs is None:
            raise ValueError("max_steps or num_epochs must be given")
        return max_steps

    @field_validator("early_stopping")
    @classmethod
    def _check_early_stopping(
        cls, early_stopping: EarlyStoppingConfig | None, info: CheckInfo
    ) -> EarlyStoppingConfig | None:
        if early_stopping is not None and info.data.get("eval_steps", 1) is None:
            raise ValueError("early_stopping has no effect without eval_steps; give it")
        return early_stopping

    @property
    def learns_from_pairs(self) -> bool:
        """Whether an example is a chosen and a rejected answer."""
        return not isinstance(self.objective, SftConfig)

    def warmup_steps_of(self, num_training_steps: int) -> int:
        """Warm-up in steps, of a job of so many; a share is rounded up, as transformers does."""
        if self.warmup_ratio is not None:
            return math.ceil(num_training_steps * self.warmup_ratio)
        return self.warmup_steps or 0
