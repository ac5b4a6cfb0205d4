"""A job: a learner with its data, its schedule, its best weights and where it stands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from loraloom.adapters.contract import AdapterConfig
from loraloom.data.tasks import ChoiceQuestion
from loraloom.data.training_set import StreamedSet, TrainingSet
from loraloom.errors import TrainingError
from loraloom.ops.dropout import sample_key
from loraloom.routing.record import RouterName
from loraloom.routing.tally import Choices, find_collapse, has_enough_choices
from loraloom.training.learner import Learner
from loraloom.training.settings import EvaluationConfig, JobConfig
from loraloom.training.step import batch
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss
from loraloom.training.step.objectives import Reference, build_objective
from loraloom.training.step.optimizers import build_scheduler, copy_all

Status = Literal["finished", "stopped early", "stopped", "failed"]


@dataclass
class Position:
    """Where a job stands."""

    step: int = 0  # steps done
    micro_step: int = 0  # micro-batches done of the next step
    tokens: int = 0  # real tokens learned from
    computed_tokens: int = 0  # the same with padding
    level: float = 0.0  # those, each by its priority, from the least level when the job joined
    loss: MicroBatchLoss = field(default_factory=partial(MicroBatchLoss, 0.0))  # of the next step
    evaluated_step: int = -1  # steps before the last evaluation; -1 before the first one
    metrics: dict[str, float] = field(default_factory=dict)  # of that evaluation
    stopped_early: bool = False
    last_loss: float | None = None  # of the last step that is done

    @property
    def has_begun(self) -> bool:
        return bool(self.tokens or self.level or self.evaluated_step >= 0)


class Job:
    """A learner with data, a schedule and the best of its weights so far."""

    def __init__(
        self,
        config: JobConfig,
        learner: Learner,
        training_set: TrainingSet | StreamedSet,
        reference: Reference | None = None,
        questions: Mapping[EvaluationConfig, list[ChoiceQuestion]] | None = None,
        inputs: Mapping[str, str] | None = None,  # digests of what it reads
        warnings: Sequence[str] = (),  # of what it starts from
    ):
        self.config = config
        self.name = config.name
        self.learner = learner
        self.adapter = learner.adapter
        self.training_set = training_set
        self.reference = reference
        self.questions = questions or {}
        self.inputs = dict(inputs or {})
        self.warnings = warnings
        self.objective = build_objective(config.train.objective)
        self.order: batch.StepOrder | batch.StreamOrder
        if isinstance(training_set, StreamedSet):
            self.order = batch.StreamOrder(training_set, config.train)
        else:
            self.order = batch.StepOrder(training_set, config.train)
        self.total_steps = self.order.total_steps
        self.scheduler = build_scheduler(config.train, learner.optimizer, self.total_steps)
        self.position = Position()
        self.selection = Selection(config.selection_metric)
        self.milestones: frozenset[int] = frozenset()  # evaluated after these steps as well
        self.best: dict[str, Tensor] | None = None  # weights of the best evaluation, on the CPU
        self.collapse = CollapseWatch()
        self._proven: list[Tensor] | None = None

    @property
    def at_boundary(self) -> bool:
        return self.position.micro_step == 0

    @property
    def window(self) -> batch.Window:
        return self.order.window(self.position.step)

    @property
    def is_complete(self) -> bool:
        return self.position.step >= self.total_steps or self.position.stopped_early

    @property
    def has_new_best(self) -> bool:
        """Whether the last evaluation was of the present weights, and the best so far."""
        return self.selection.step == self.position.step

    @property
    def is_evaluation_due(self) -> bool:
        position = self.position
        eval_steps = self.config.train.eval_steps
        is_measured = bool(self.training_set.validation or self.config.eval)
        if not is_measured or not self.at_boundary or position.evaluated_step == position.step:
            return False
        if position.step == 0:
            return self.config.train.eval_on_start
        is_milestone = self.is_complete or position.step in self.milestones
        return is_milestone or (eval_steps is not None and position.step % eval_steps == 0)

    def micro_batch(self) -> MicroBatch:
        window = self.window
        train = self.config.train
        examples = window.micro_batch(self.position.micro_step)
        clip_gradient = None
        if self.position.micro_step + 1 == window.num_micro_batches:
            clip_gradient = partial(self.learner.clip_gradient, train.max_grad_norm)
        return MicroBatch(
            self.adapter,
            examples,
            [sample_key(self.config.seed, window.epoch, row.sample_id) for row in examples],
            window,
            self.objective,
            self.reference,
            max_row_length=train.max_length if train.packing else None,
            loss_scale=self.learner.loss_scale.scale,
            clip_gradient=clip_gradient,
        )

    def accept(
        self, micro_batch: MicroBatch, loss: MicroBatchLoss | TrainingError
    ) -> dict[str, Any] | None:
        """Count a micro-batch; after a step's last one, make the step and return its metrics."""
        if isinstance(loss, TrainingError):
            raise loss
        self._check_finite("loss", loss.loss + loss.aux_loss, self.position.step + 1)
        self._proven = None
        position = self.position
        position.micro_step += 1
        position.tokens += micro_batch.num_tokens
        position.computed_tokens += loss.computed_tokens
        position.level += loss.computed_tokens / self.config.priority
        position.loss += loss
        if position.micro_step < self.window.num_micro_batches:
            return None
        return self._make_step(position.loss)

    def _make_step(self, loss: MicroBatchLoss) -> dict[str, Any]:
        learning_rate = self.learner.learning_rate
        if self.learner.overflows(loss.grad_norm):
            self._check_skipped_steps()
        else:
            self._check_finite("gradient norm", loss.grad_norm, self.position.step + 1)
            # Until a finite loss proves new weights, the old take the gradients' place in memory.
            weights = self.learner.parameters.values()
            self._proven = [weight.detach().clone() for weight in weights]
            self.learner.apply()
            self.scheduler.step()
        self.learner.zero_grad()
        position = self.position
        if self.reference is not None and isinstance(self.training_set, StreamedSet):
            for row in self.window.rows:  # they never come again
                self.reference.log_probs.pop(row.sample_id, None)
        position.step += 1
        position.micro_step = 0
        position.loss = MicroBatchLoss(0.0)
        position.last_loss = loss.loss
        return self._step_metrics(loss, learning_rate)

    def _check_skipped_steps(self) -> None:
        scale = self.learner.loss_scale.scale
        if scale < 1:
            step = self.position.step + 1
            raise self._error("gradients overflow float16 even without scaling", step)
        if self.learner.loss_scale.skipped_steps == self.total_steps:
            raise TrainingError(
                f"job {self.name}: all of its {self.total_steps} steps were skipped, as gradients "
                f"overflow float16; the last one halved the loss scale to {scale:g}; train "
                "longer, or in bfloat16"
            )

    def _step_metrics(self, loss: MicroBatchLoss, learning_rate: float) -> dict[str, Any]:
        position = self.position
        metrics: dict[str, Any] = {
            "step": position.step,
            "epoch": round(self.order.epochs_after(position.step), 4),
            "loss": loss.loss,
            "aux_loss": loss.aux_loss,
            "learning_rate": learning_rate,
            "grad_norm": loss.grad_norm,
            "tokens": position.tokens,
            "computed_tokens": position.computed_tokens,
        }
        if self.learner.scales_losses:
            metrics["loss_scale"] = self.learner.loss_scale.scale
            metrics["skipped_steps"] = self.learner.loss_scale.skipped_steps
        if loss.router_entropy is not None:
            metrics["router/entropy"] = loss.router_entropy
            metrics["router/load_cv"] = loss.router_load_cv
        warnings = self.collapse.take(position.step, loss.tokens_per_expert, self.config.adapter)
        if warnings:
            metrics["warnings"] = list(warnings)
        # The job's metrics win against an objective's of the same name.
        for name, value in loss.metrics.items():
            metrics.setdefault(name, value)
        # JSON has nothing for what is not finite.
        return {
            name: value
            for name, value in metrics.items()
            if not isinstance(value, float) or math.isfinite(value)
        }

    def take_evaluation(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._check_finite(name, value, self.position.step)
        # A loss proves the weights, and so does a right answer: scores of NaN are wrong answers.
        if any(metrics.values()):
            self._proven = None
        position = self.position
        train = self.config.train
        # Rungs of a sweep change nothing.
        is_due = position.step % (train.eval_steps or math.inf) == 0
        is_best = (is_due or self.is_complete) and self.selection.update(position.step, metrics)
        position.evaluated_step = position.step
        position.metrics = metrics
        if train.early_stopping is not None:
            patience = train.early_stopping.patience
            position.stopped_early = self.selection.evaluations_since >= patience
        if is_best:
            tensors = self.adapter.tensors().items()
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}

    def find_fault_of_weights(self) -> TrainingError | None:
        # Read at once: each read waits for a device.
        are_finite = [weight.isfinite().all() for weight in self.learner.parameters.values()]
        device = are_finite[0].device
        if torch.stack([is_finite.to(device) for is_finite in are_finite]).all():
            return None
        return self._error("weights must be finite, got inf or nan", self.position.step)

    def restore_proven_weights(self) -> None:
        # They are the present ones, unless nothing finite was computed since the last step.
        if self._proven is not None:
            copy_all(self.learner.parameters.values(), self._proven)
            # Their step is gone, and so is an evaluation that came to nothing.
            self.position.evaluated_step = -1
            self.position.step -= 1
        self.release()

    def release(self) -> None:
        self.learner.release()
        self._proven = None

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.learner.state_dict(),
            "proven": self._proven,
            "best": self.best,
            "scheduler": self.scheduler.state_dict(),
            "position": asdict(self.position),
            "selection": asdict(self.selection),
            "collapse": asdict(self.collapse),
            "reference": {} if self.reference is None else self.reference.log_probs,
            "order": self.order.state_dict(self.position.step),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
        self._proven = state["proven"]
        self.best = state["best"]
        self.scheduler.load_state_dict(state["scheduler"])
        loss = MicroBatchLoss(**state["position"]["loss"])
        self.position = Position(**{**state["position"], "loss": loss})  # ty: ignore[invalid-argument-type]
        self.selection = Selection(**state["selection"])
        self.collapse = CollapseWatch(**state["collapse"])
        if self.reference is not None:
            self.reference.log_probs = state["reference"]
        self.order.load_state_dict(self.position.step, state["order"])

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise self._error(f"{name} must be finite, got {value}", step)

    def _error(self, fault: str, step: int) -> TrainingError:
        return TrainingError(
            f"job {self.name}, step {step}: {fault}; its last good weights are kept; "
            "lower learning_rate, or look at the data"
        )


@dataclass(frozen=True)
class JobResult:
    """The result of a job, as in its result.json."""

    job: str
    status: Status  # stopped early: its metric no longer got better; stopped: from outside
    error: str | None  # why it failed
    method: str  # its title: LoRA, MixLoRA, ...
    base_model: str
    num_parameters: int  # that were trained
    steps: int
    epochs: float
    tokens: int  # real ones that it learned from
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


def metric_mode(metric: str | None) -> str:
    return "min" if metric is None or metric.endswith("loss") else "max"


@dataclass
class Selection:
    """The best evaluation of a job so far; without a metric the last weights count."""

    metric: str | None
    value: float | None = None
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations_since: int = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        if self.metric is None:
            return False
        value = metrics[self.metric]
        sign = 1 if metric_mode(self.metric) == "min" else -1
        if self.value is not None and sign * value >= sign * self.value:
            self.evaluations_since += 1
            return False
        self.value = value
        self.step = step
        self.metrics = dict(metrics)
        self.evaluations_since = 0
        return True


# Steps whose load is judged together, so that a single uneven step warns nobody.
WINDOW_STEPS = 25


@dataclass
class CollapseWatch:
    """Adds up how often routers choose each expert, and judges it window by window."""

    num_steps: int = 0
    tokens_per_expert: dict[RouterName, list[int]] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def take(self, step: int, chosen: Choices, config: AdapterConfig) -> Sequence[str]:
        """Take a step's choices in; give the first warning."""
        if config.experts_per_token is None or not chosen:
            return ()
        self.num_steps += 1
        self.tokens_per_expert = batch.add_counts(self.tokens_per_expert, chosen)
        # It takes longer where there are too few tokens to be judged.
        if self.num_steps < WINDOW_STEPS or not has_enough_choices(self.tokens_per_expert):
            return ()
        collapse = find_collapse(self.tokens_per_expert, config.experts_per_token)
        first_step = step - self.num_steps + 1
        self.num_steps = 0
        self.tokens_per_expert = {}
        if collapse is None or self.warnings:
            return ()
        self.warnings = [f"steps {first_step} to {step}: {collapse}; {config.collapse_advice}"]
        return self.warnings
