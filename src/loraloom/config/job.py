"""What a run file says of a job: an adapter, its data, how it learns and what it is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from loraloom.adapters import AnyAdapterConfig, any_method, when_registered
from loraloom.config.data import (
    DataConfig,
    Scoring,
    SourceConfig,
    TaskReference,
    check_effect,
    default_scoring,
    is_file_of_test,
    task_name,
)
from loraloom.config.fields import CheckInfo, StrictModel, check_name
from loraloom.config.train import SCHEDULERS_ON_METRIC, TrainConfig


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
        return check_effect(path, info)

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

    name: Annotated[str, AfterValidator(check_name)]
    """Name of the job, of its adapter and of their directory in output_dir."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of the data, dropout and jitter."""
    priority: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Share of the computed tokens, against other jobs', where max_tokens_per_step bounds steps."""
    adapter: AnyAdapterConfig
    """Method and size of the adapter."""
    start_from: str | None = Field(default=None, min_length=1)
    """Adapter to start from, by directory or hub id, of the same method and size; null for new."""
    data: DataConfig
    """What the job learns from."""
    train: TrainConfig
    """How it learns."""
    eval: tuple[EvaluationConfig, ...] = Field(default=(), validate_default=True)
    """Choice tasks to score every train.eval_steps, and at the end."""

    @field_validator("data")
    @classmethod
    def _check_groups(cls, data: DataConfig, info: CheckInfo) -> DataConfig:
        adapter = info.data.get("adapter")
        in_groups = any(source.expert_group for source in data.mix or ())
        if in_groups and adapter and not adapter.has_expert_groups:
            raise ValueError(
                f"mix has sources with an expert_group, which has no effect on {adapter.title} "
                "with these settings; remove it"
            )
        return data

    @field_validator("eval")
    @classmethod
    def _check_evaluations(
        cls, evaluations: tuple[EvaluationConfig, ...], info: CheckInfo
    ) -> tuple[EvaluationConfig, ...]:
        tasks = [task_name(evaluation.task) for evaluation in evaluations]
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"eval must name each task once, got {', '.join(tasks)}")
        if "train" in info.data and "data" in info.data:
            _check_metrics(info.data["train"], info.data["data"], evaluations)
        return evaluations

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: TrainConfig, info: CheckInfo) -> TrainConfig:
        data, adapter = info.data.get("data"), info.data.get("adapter")
        if data is not None:
            _check_fits_objective(data, train)
            if data.streaming:
                _check_needs_no_size(train)
        if train.router_lr_ratio and adapter and not adapter.experts_per_router:
            raise ValueError(
                f"router_lr_ratio has no effect on {adapter.title}, which has no routers; remove it"
            )
        if train.loraplus_lr_ratio and adapter and not adapter.trains_B:
            raise ValueError(
                f"loraplus_lr_ratio has no effect on {adapter.title}, which trains no B; remove it"
            )
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


def _take_further_methods() -> None:
    JobConfig.model_fields["adapter"].annotation = any_method()
    JobConfig.model_rebuild(force=True)


when_registered(_take_further_methods)


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


def _check_needs_no_size(train: TrainConfig) -> None:
    """Check that nothing depends on how many rows there are, or on all of their lengths."""
    if train.max_steps is None:
        raise ValueError(
            "train.num_epochs needs the number of rows, which data.streaming does not know; give "
            "train.max_steps"
        )
    if train.group_by_length:
        raise ValueError(
            "train.group_by_length needs the lengths of all rows, which data.streaming does not "
            "know; take train.packing"
        )


def _selecting_metrics(
    train: TrainConfig, data: DataConfig, evaluations: Sequence[EvaluationConfig]
) -> list[str]:
    """Metrics that may choose weights: a test split must not."""
    held_out: list[str] = []
    if data.has_validation and not (data.validation and _is_of_test(data.validation)):
        held_out = ["eval/loss"]
        if train.learns_from_pairs:
            held_out += ["eval/rewards/accuracies", "eval/rewards/margins"]
    return held_out + [item.metric for item in evaluations if not _is_test(item.split)]


def _is_of_test(source: SourceConfig) -> bool:
    """Whether a source is a test split, or a file that is called so."""
    return _is_test(source.split) or is_file_of_test(source.dataset)


def _is_test(split: str | None) -> bool:
    """Whether a split has rows of a test split, `train+test[:100]` for instance."""
    return any(part.partition("[")[0].strip() == "test" for part in (split or "").split("+"))


def _check_metrics(
    train: TrainConfig, data: DataConfig, evaluations: Sequence[EvaluationConfig]
) -> None:
    """Check that what waits for an evaluation gets one."""
    give = "give data.validation_fraction, data.validation or eval"
    selecting = _selecting_metrics(train, data, evaluations)
    is_measured = data.has_validation or bool(evaluations)
    if train.eval_steps is not None and not is_measured:
        raise ValueError(f"train.eval_steps has nothing to evaluate; {give}")
    if train.eval_on_start and not is_measured:
        raise ValueError(f"train.eval_on_start has nothing to evaluate; {give}")
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
