"""What a run file says: one base model and the jobs that share it.

A field's docstring is its help text. Names are transformers' and trl's. A step is the optimizer's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, reduce
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, field_validator
from typing_extensions import override

from loraloom import adapters
from loraloom.base.targets import Pattern
from loraloom.config.data import (
    MAX_LENGTH,
    DataConfig,
    Scoring,
    TaskReference,
    default_scoring,
    is_file_of_test,
    task_name,
)
from loraloom.config.fields import StrictModel, check_name, checked
from loraloom.config.model import BaseModelConfig
from loraloom.config.text import apply_override, local_path, read_settings, set_setting
from loraloom.errors import ConfigError, shown
from loraloom.training.sweep_settings import SweepConfig, parameter_value

# fmt: off
# The optimizers of torch.optim, in lower case, and bitsandbytes' as transformers calls them. Four
# can't be used: lbfgs evaluates the loss several times a step, muon takes matrices only (a
# mixture's experts are stacked), rprop reads no schedule, sparseadam takes sparse gradients only.
OptimizerName = Literal[
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam",
    "rmsprop", "sgd", "adamw_8bit", "ademamix_8bit", "lion_8bit", "paged_adamw_8bit",
    "paged_adamw_32bit", "paged_ademamix_8bit", "paged_lion_8bit",
]
# The schedulers of transformers (SchedulerType) that need no metric.
LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
    "constant_with_warmup", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]
TrackerName = Literal[
    "jsonl", "aim", "clearml", "comet_ml", "dvclive", "mlflow",
    "swanlab", "tensorboard", "trackio", "wandb",
]
# fmt: on
BASE_REFERENCE = "base"
_GIVE = "set data.validation_fraction, data.validation or eval"


class ObjectiveConfig(StrictModel):
    """What a job minimizes; `terms` computes it where step/objectives.py has no function."""

    learns_from_pairs: ClassVar[bool] = False
    """Whether its data are pairs of answers."""

    name: Any = None

    def terms(self, scored: Any, totals: Any) -> tuple[Any, Mapping[str, Any]]:
        """Compute a micro-batch's share of the step's loss, a scalar, and of metrics by name."""
        raise NotImplementedError


class SftConfig(ObjectiveConfig):
    """Supervised fine-tuning: the mean of -log p over labels."""

    name: Literal["sft"] = "sft"
    """Supervised fine-tuning on the answers in the data."""


class _PairsConfig(ObjectiveConfig):
    learns_from_pairs = True
    loss_type: Any = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """sigmoid: fraction of pairs that are assumed to be labeled the wrong way round."""

    @override
    def contradictions(self) -> Iterator[str]:
        if self.label_smoothing and self.loss_type != "sigmoid":
            yield f"label_smoothing requires loss_type sigmoid, got {self.loss_type}"


class DpoConfig(_PairsConfig):
    """Direct preference optimization against a reference policy.

    Source: Rafailov et al. 2023, DPO, arXiv:2305.18290; Azar et al. 2023, IPO, arXiv:2310.12036;
    label smoothing: Mitchell 2023, A note on DPO with noisy preferences (cDPO).
    """

    name: Literal["dpo"] = "dpo"
    """Direct preference optimization."""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss of DPO's paper, or of IPO's on log-probabilities per token."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference policy; τ in IPO's paper."""
    reference: str = Field(default=BASE_REFERENCE, min_length=1)
    """Reference policy: base for the base model, or an adapter's directory or Hub ID."""


class CpoConfig(_PairsConfig):
    """Contrastive preference optimization: no reference, and a likelihood term on chosen answers.

    Source: Xu et al. 2024, CPO, arXiv:2401.08417; hinge: Zhao et al. 2023, SLiC-HF,
    arXiv:2305.10425.
    """

    name: Literal["cpo"] = "cpo"
    """Contrastive preference optimization."""
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid"
    """Loss of the margin between chosen and rejected."""
    beta: float = Field(default=0.1, gt=0)
    """Factor of the margin."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of the chosen answers' mean -log p per token."""


class OptimizerConfig(StrictModel):
    """How an adapter's weights follow their gradients."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of the schedule."""
    optimizer: Annotated[OptimizerName, BeforeValidator(lambda name: str(name).lower())] = "adamw"
    """An optimizer of torch.optim, or of bitsandbytes in 8 bits or paged, by name in any case."""
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, for example `{betas: [0.9, 0.95]}`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the adapter's weights. 0 as in transformers' Trainer; torch's own is 0.01."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: multiple of learning_rate for lora_B (Hayou et al., arXiv:2402.12354)."""
    router_lr_ratio: float | None = Field(default=None, gt=0)
    """Multiple of learning_rate for routers."""
    lr_ratios: dict[Pattern, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Further multiples, by regular expressions of which the first counts that matches the end of a
    tensor's name, such as `layers.0.mlp.up_proj.experts.3.lora_A`; 0 freezes."""

    @override
    def contradictions(self) -> Iterator[str]:
        if taken := {"lr", "weight_decay", "params"} & self.optimizer_args.keys():
            yield f"optimizer_args must not set {', '.join(sorted(taken))}; set train's own keys"


class EarlyStoppingConfig(StrictModel):
    """Stop when a metric no longer improves."""

    metric: str = "eval/loss"
    """Metric to watch, by its name in metrics.jsonl: eval/loss, eval/<task>/accuracy, ..."""
    patience: int = Field(default=3, ge=1)
    """Number of evaluations without improvement after which the job stops."""


class TrainConfig(OptimizerConfig):
    """Hyperparameters and schedule of a job."""

    objective: Annotated[SftConfig | DpoConfig | CpoConfig, Field(discriminator="name")] = Field(
        default_factory=SftConfig
    )
    """Objective to minimize: sft, or dpo or cpo on preference data. Default: sft."""
    lr_scheduler: LrScheduler = "linear"
    """A scheduler of transformers by name."""
    lr_scheduler_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the scheduler, for example `{num_cycles: 2}`."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Number of steps over which the learning rate rises to its peak."""
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Warmup steps as a fraction of all steps."""
    batch_size: int = Field(default=16, ge=1)
    """Rows in a step; with preference data, pairs of rows."""
    micro_batch_size: int = Field(default_factory=lambda fields: fields["batch_size"], ge=1)
    """Rows or pairs in a forward; only load-balance losses depend on it. Default: batch_size."""
    num_epochs: int | None = Field(default=None, ge=1)
    """Number of passes over the data; or set max_steps."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of steps; or set num_epochs."""
    max_length: int = Field(default=MAX_LENGTH, ge=2)
    """Maximum length of a row in tokens. Longer rows are truncated."""
    group_by_length: bool = False
    """Put examples of similar length into the same steps, for less padding."""
    packing: bool = False
    """Put several examples into a row of up to max_length tokens; nothing else changes."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Maximum norm of the adapter's gradient; null: no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate every N steps; null: only at the end."""
    eval_on_start: bool = False
    """Evaluate before the first step as well."""
    save_steps: int | None = Field(default=None, ge=1)
    """Save a checkpoint for --resume and `checkpoint-<step>/`, an adapter to load, every N steps;
    null: a checkpoint at evaluations and the end, and the best evaluation's adapter."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Maximum number of `checkpoint-<step>/` directories of the job: the oldest are deleted, but
    neither the newest nor the best evaluation's. null: no maximum."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop when a metric no longer improves."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        warms_up = self.warmup_steps or self.warmup_ratio
        if warms_up and self.lr_scheduler == "constant":
            yield "warmup is not supported by constant; use constant_with_warmup"
        if self.lr_scheduler_args and self.lr_scheduler in ("constant", "constant_with_warmup"):
            yield f"lr_scheduler_args is not supported by {self.lr_scheduler}; remove the arguments"
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            yield "warmup_ratio and warmup_steps exclude each other; set only one setting"
        if self.batch_size % (size := self.micro_batch_size):
            yield f"micro_batch_size must divide batch_size={self.batch_size}, got {size}"
        if self.max_steps is None and self.num_epochs is None:
            yield "train must set max_steps or num_epochs, got neither"
        if self.max_steps is not None and self.num_epochs is not None:
            yield (
                "train must set max_steps or num_epochs, not both; remove one, on the command line "
                "of the first job with --set jobs.0.train.num_epochs=null"
            )
        if self.early_stopping is not None and self.eval_steps is None:
            yield "early_stopping requires eval_steps; set train.eval_steps"


class EvaluationConfig(StrictModel):
    """Choice task to score during and after training."""

    task: TaskReference
    """Choice task to score: a name, or the .yaml file of your own task."""
    path: str | None = Field(default=None, min_length=1)
    """Directory of the task's data, or its parent directory; null: the Hub."""
    split: str = Field(default="validation", min_length=1)
    """Split to score. Test splits are reported, but never select the weights."""
    scoring: Scoring | None = Field(default_factory=default_scoring)
    """Score the choice's label or its text. Default: label, or the task file's."""
    limit: int | None = Field(default=None, ge=1)
    """Score only the first N questions."""

    @property
    def metric(self) -> str:
        return f"eval/{task_name(self.task)}/accuracy"


class JobConfig(StrictModel):
    """An adapter with its data and hyperparameters."""

    name: Annotated[str, AfterValidator(check_name)]
    """Name of the job, its adapter and its directory in output_dir."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights, the order of the data, dropout and jitter."""
    priority: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Share of the tokens relative to other jobs, if max_tokens_per_step limits steps."""
    adapter: adapters.AnyAdapterConfig
    """Method and size of the adapter."""
    start_from: str | None = Field(default=None, min_length=1)
    """Adapter to start from, by directory or Hub ID, of the same method and size; null for new."""
    data: DataConfig
    """Training and validation data."""
    train: TrainConfig
    """Settings of training."""
    eval: tuple[EvaluationConfig, ...] = ()
    """Choice tasks to score every train.eval_steps, and at the end."""

    @override
    def contradictions(self) -> Iterator[str]:
        if self.train.router_lr_ratio and not self.adapter.experts_per_router:
            yield f"train.router_lr_ratio requires routers, which {self.adapter.title} lacks"
        train, has_pairs = self.train, self.train.objective.learns_from_pairs
        held_out = () if self.data.validation is None else (self.data.validation,)
        formats = {source.format for source in (*self.data.sources, *held_out)}
        if not has_pairs and "preference" in formats:
            yield (
                "train.objective must be dpo or cpo for data of format preference, got "
                f"{train.objective.name}; for the chosen answers alone: format instruction, fields "
                "{output: chosen, ...}"
            )
        if has_pairs and (unpaired := sorted(map(str, formats - {"preference", None}))):
            yield (
                f"train.objective {train.objective.name} requires pairs of answers: a task, or a "
                f"dataset of format preference, got format {unpaired[0]}"
            )
        if self.data.streaming and (train.max_steps is None or train.group_by_length):
            yield "data.streaming requires train.max_steps, and no num_epochs or group_by_length"
        selecting = self.selecting_metrics
        tasks = [task_name(evaluation.task) for evaluation in self.eval]
        if len(set(tasks)) < len(tasks):
            yield f"eval must name each task once, got {', '.join(tasks)}"
        evaluates = train.eval_steps or train.eval_on_start
        if evaluates and not (self.data.has_validation or self.eval):
            yield f"train.eval_steps or eval_on_start requires data to evaluate; {_GIVE}"
        if train.early_stopping is not None and train.early_stopping.metric not in selecting:
            yield (
                "train.early_stopping.metric must be one that the job measures outside test splits "
                f"({', '.join(selecting) or 'none'}), got {train.early_stopping.metric!r}"
            )

    @property
    def selection_metric(self) -> str | None:
        """Early stopping's metric, else the first possible one; None: the last weights are kept."""
        if self.train.early_stopping is not None:
            return self.train.early_stopping.metric
        return next(iter(self.selecting_metrics), None)

    @property
    def selecting_metrics(self) -> list[str]:
        """Metrics that may choose weights: those that are measured outside test splits."""
        source, held_out = self.data.validation, list[str]()
        is_of_test = source and (_is_test(source.split) or is_file_of_test(source.dataset))
        if self.data.has_validation and not is_of_test:
            held_out = ["eval/loss"]
            if self.train.objective.learns_from_pairs:
                held_out += ["eval/rewards/accuracies", "eval/rewards/margins"]
        return held_out + [item.metric for item in self.eval if not _is_test(item.split)]


def _is_test(split: str | None) -> bool:
    """Whether a split has rows of a test split, `train+test[:100]` for instance."""
    return any(term.partition("[")[0].strip() == "test" for term in (split or "").split("+"))


class ParallelConfig(StrictModel):
    """How the processes that torchrun starts share a base model."""

    base: Literal["replicated", "fsdp"] = "replicated"
    """replicated: a whole copy in each process; fsdp: a shard of each layer in each process."""


class RunConfig(BaseModelConfig):
    """One base model and the jobs that share it."""

    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    """How several processes share the base model; each computes a share of all jobs' rows."""
    output_dir: Path
    """Directory of the results, with a directory per job."""
    max_tokens_per_step: int | None = Field(default=None, ge=1)
    """Maximum tokens per step, with padding; null: all jobs take part in each step."""
    keep_snapshots: int = Field(default=2, ge=1)
    """Number of checkpoints to keep. --resume uses the newest undamaged checkpoint."""
    memory_limit: ByteSize | None = None
    """Maximum memory of an accelerator to use: bytes or "20GB"; null: all of it."""
    trackers: tuple[TrackerName, ...] = ("jsonl",)
    """Trackers of accelerate by name, each with a run per job. metrics.jsonl is always written."""
    jobs: tuple[JobConfig, ...] = ()
    """Adapters to train, all in the same steps."""
    sweep: SweepConfig | None = None
    """Many versions of a job, trained in the same steps; in place of jobs."""

    @field_validator("output_dir", mode="before")
    @classmethod
    def _check_output_dir(cls, output_dir: Any) -> Any:
        if not isinstance(output_dir, str | Path):
            return output_dir
        if re.match(r"\w\w+:/", str(output_dir)):  # a Path has one / only
            url = shown(output_dir)
            raise ValueError(f"output_dir must be a directory, got the URL {url}; mount it (NFS)")
        return local_path(output_dir, "output_dir")

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        names = [job.name.casefold() for job in self.all_jobs]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"job names must be unique, also in a sweep, got {name!r} again"
        if self.sweep is not None:
            if self.jobs:
                yield "a run must set jobs or sweep, not both; train them in two runs"
            common = set.intersection(*(set(job.selecting_metrics) for job in self.trials))
            if self.sweep.metric not in common:
                yield (
                    f"sweep.metric must be one that every job measures outside test splits "
                    f"({', '.join(sorted(common)) or 'none'}), got {self.sweep.metric!r}; {_GIVE}"
                )

    # Drawn once: the check of a run file has all of them built, and the run trains these.
    @cached_property
    def trials(self) -> tuple[JobConfig, ...]:
        """The jobs of the sweep that are known beforehand: all but TPE's later ones."""
        combinations = [] if self.sweep is None else self.sweep.combinations()
        return tuple(self.trial(number, drawn) for number, drawn in enumerate(combinations))

    def trial(self, number: int, combination: Mapping[str, Any]) -> JobConfig:
        assert self.sweep is not None
        settings: Any = self.sweep.job
        for path, drawn in combination.items():
            origin = f"parameters.{path}"
            settings = set_setting(settings, path.split("."), parameter_value(drawn), origin)
        name = self.sweep.job_name(number, combination)
        return checked(JobConfig, {**settings, "name": name}, origin="sweep.job: ")

    @property
    def all_jobs(self) -> tuple[JobConfig, ...]:
        return self.jobs or self.trials

    @property
    def first_jobs(self) -> tuple[JobConfig, ...]:
        if self.sweep is None:
            return self.jobs
        return self.trials[: self.sweep.num_concurrent]


# The unions of all methods and objectives are part of the models, so they are built again.
def _build_again() -> None:
    any_objective: Any = Union[tuple(OBJECTIVES)]  # noqa: UP007
    TrainConfig.model_fields["objective"].annotation = any_objective
    JobConfig.model_fields["adapter"].annotation = adapters.any_method()
    for model in (TrainConfig, JobConfig, RunConfig):
        model.model_rebuild(force=True)


OBJECTIVES: list[type[ObjectiveConfig]] = [SftConfig, DpoConfig, CpoConfig]
_OBJECTIVE = TypeVar("_OBJECTIVE", bound=type[ObjectiveConfig])


def register_objective(config: _OBJECTIVE) -> _OBJECTIVE:
    """Register your own objective for the run files and clients of this process.

    For all processes, install a package with an entry point of the group `loraloom.objectives`.

    Raises:
        ConfigError: If the objective has no name or no `terms`, or the name is taken.
    """
    names = {kind.model_fields["name"].default: kind for kind in OBJECTIVES}
    name = config.model_fields["name"]
    former = names.get(name.default, config)  # perhaps this one, defined by a cell that ran before
    is_new = (former.__module__, former.__qualname__) == (config.__module__, config.__qualname__)
    is_whole = get_args(name.annotation) == (name.default,)
    if not is_new or not is_whole or config.terms is ObjectiveConfig.terms:
        raise ConfigError(
            'an objective must have terms() and name: Literal["x"] = "x", not one of '
            f"{', '.join(names)}, got {shown(config)} with {shown(name.default)}"
        )
    if config not in OBJECTIVES:
        OBJECTIVES[:] = [*(kind for kind in OBJECTIVES if kind is not former), config]
        _build_again()
    return config


_build_again()  # with methods that were registered before this was imported
adapters.LISTENERS.append(_build_again)
adapters.take_entries("loraloom.objectives", lambda config, package: register_objective(config))


def load_run_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> RunConfig:
    is_file = not isinstance(source, Mapping)
    settings = read_settings(source, "a run file") if is_file else dict(source)
    settings = reduce(apply_override, overrides, settings)
    origin = f"{source}:\n  " if is_file else "the run: "
    return checked(RunConfig, settings, origin=origin, other_names=_other_names())


def load_job_config(path: str | Path) -> JobConfig:
    settings = {"name": Path(path).stem} | read_settings(path, "a job file")
    return checked(JobConfig, settings, origin=f"{path}:\n  ", other_names=_other_names())


def _other_names() -> dict[str, str]:
    return {name: ours for config in adapters.CONFIGS for name, ours in config.aliases.items()}


def schema() -> dict[str, Any]:
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **RunConfig.model_json_schema()}
