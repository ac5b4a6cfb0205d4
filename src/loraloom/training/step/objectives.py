"""What a job minimizes, as a function of the log-probabilities of its labels.

Axes: N labels, S samples, P pairs, S = 2P. A sample is a row of the forward; of pairs of answers, a
chosen one and its rejected one alternate. docs/objectives.md says how to add one.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from loraloom.data.tokens import Example, TrainingExample, count_labels
from loraloom.errors import AdapterError, TrainingError, shown
from loraloom.generation.scoring import label_log_probs
from loraloom.host.host import Host
from loraloom.training.settings import BASE_REFERENCE, CpoConfig, DpoConfig, ObjectiveConfig


@dataclass(frozen=True)
class StepTotals:
    """What a step has in all its micro-batches; losses are divided by it."""

    num_examples: int
    num_labels: int
    num_chosen_labels: int  # of the first row of each example: a pair's chosen answer


def count_totals(examples: Sequence[TrainingExample]) -> StepTotals:
    return StepTotals(
        num_examples=len(examples),
        num_labels=sum(count_labels(row) for example in examples for row in example.rows),
        num_chosen_labels=sum(count_labels(example.rows[0]) for example in examples),
    )


@dataclass(frozen=True)
class ScoredSamples:
    """Log p of samples, and under the reference policy if the job has one."""

    log_probs: Float[Tensor, " N"]
    num_labels: Sequence[int]
    references: Float[Tensor, " S"] | None = None  # log p under the reference policy
    # `Example.extras` by name, of each sample; None of one without.
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def by_sample(self) -> tuple[Tensor, ...]:
        return self.log_probs.split(list(self.num_labels))

    @cached_property
    def sums(self) -> Tensor:
        return torch.stack([log_probs.sum() for log_probs in self.by_sample])

    @property
    def lengths(self) -> Tensor:
        return self.log_probs.new_tensor([max(count, 1) for count in self.num_labels])


# A micro-batch's share of its step's loss, and of metrics by their names in metrics.jsonl: scalars.
Terms = tuple[Tensor, Mapping[str, Tensor]]
# A loss whose shares add up: it does not depend on how a step is cut into micro-batches.
Objective = Callable[[ScoredSamples, StepTotals], Terms]


def sft(scored: ScoredSamples, totals: StepTotals) -> Terms:
    return -scored.log_probs.sum() / max(totals.num_labels, 1), {}


def dpo(config: DpoConfig, scored: ScoredSamples, totals: StepTotals) -> Terms:
    """The mean over pairs of a loss of Δ = log(π/π_ref)(chosen) - log(π/π_ref)(rejected).

    sigmoid: `-log σ(βΔ)`, smoothed (Rafailov et al. 2023, arXiv:2305.18290, eq. 7). ipo:
    `(Δ' - 1/(2β))²` (Azar et al. 2023, arXiv:2310.12036, eq. 17), Δ' of log-ratios per label, as in
    trl 1.16 `DPOTrainer` on the authors' word.
    """
    assert scored.references is not None, "a DPO job has a reference"
    log_ratios = scored.sums - scored.references  # (S,)
    if config.loss_type == "ipo":
        chosen, rejected = _split_pairs(log_ratios / scored.lengths)  # (P,)
        losses = (chosen - rejected - 1 / (2 * config.beta)).square()
    else:
        chosen, rejected = _split_pairs(log_ratios)
        losses = _sigmoid_losses(config.beta * (chosen - rejected), config.label_smoothing)
    metrics = _pair_metrics(config.beta * log_ratios, scored, totals.num_examples)
    return losses.sum() / totals.num_examples, metrics


def cpo(config: CpoConfig, scored: ScoredSamples, totals: StepTotals) -> Terms:
    """The mean over pairs of a loss of β(log π(chosen) - log π(rejected)), and α × NLL."""
    # sigmoid: `-log σ(margin)`, smoothed; hinge: `max(0, 1 - margin)`, as in trl 1.16 `CPOTrainer`.
    # NLL is of all the step's chosen labels. Source: Xu et al. 2024, arXiv:2401.08417, eq. 5.
    chosen, rejected = _split_pairs(scored.sums)
    margins = config.beta * (chosen - rejected)  # (P,)
    if config.loss_type == "hinge":
        losses = (1 - margins).relu()
    else:
        losses = _sigmoid_losses(margins, config.label_smoothing)
    nll = -chosen.sum() / max(totals.num_chosen_labels, 1)
    loss = losses.sum() / totals.num_examples + config.cpo_alpha * nll
    metrics = _pair_metrics(config.beta * scored.sums, scored, totals.num_examples)
    return loss, {**metrics, "nll_loss": nll.detach()}


@dataclass(frozen=True)
class RegisteredObjective:
    """An objective of a user's code, whose results are checked before they meet those of others."""

    config: ObjectiveConfig

    def __call__(self, scored: ScoredSamples, totals: StepTotals) -> Terms:
        """Compute the loss and metrics as scalar tensors.

        Raises:
            TrainingError: If one of them is not a single number.
        """
        terms = self.config.terms(scored, totals)
        if not isinstance(terms, tuple) or len(terms) != 2 or not isinstance(terms[1], Mapping):
            raise TrainingError(
                f"{self._name} must return a pair (loss, metrics), metrics by name, got "
                f"{shown(terms)}; return loss, {{}} for none"
            )
        loss, metrics = terms
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise TrainingError(
                f"{self._name} must return the loss as a tensor with one number, got "
                f"{_described(loss)}; return its sum divided by a total of the step"
            )
        if scored.log_probs.requires_grad and not loss.requires_grad:
            raise TrainingError(
                f"{self._name} must compute the loss from log-probabilities, got one without a "
                "gradient; remove detach() and item() from its way"
            )
        return loss.reshape(()), {
            name: self._scalar(name, value, loss) for name, value in metrics.items()
        }

    def _scalar(self, name: object, value: object, loss: Tensor) -> Tensor:
        try:
            metric = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            metric = None
        if (
            not isinstance(name, str)
            or metric is None
            or metric.numel() != 1
            or metric.is_complex()
        ):
            raise TrainingError(
                f"{self._name} must return metrics that are single numbers by name, got "
                f"{_described(value)} for {shown(name)}; return its sum divided by a total of the "
                "step, or leave it out"
            )
        return metric.detach().reshape(()).to(loss)

    @property
    def _name(self) -> str:
        return f"objective {shown(self.config.name)}"


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return shown(value)


def build_objective(config: ObjectiveConfig) -> Objective:
    if type(config).terms is not ObjectiveConfig.terms:
        return RegisteredObjective(config)
    match config:
        case DpoConfig():
            return partial(dpo, config)
        case CpoConfig():
            return partial(cpo, config)
        case _:
            return sft


def has_fixed_metrics(objective: Objective) -> bool:
    function = objective.func if isinstance(objective, partial) else objective
    return function in (sft, dpo, cpo)


def _split_pairs(values: Float[Tensor, " S"]) -> tuple[Tensor, Tensor]:
    return values[0::2], values[1::2]


def _sigmoid_losses(margins: Float[Tensor, " P"], label_smoothing: float) -> Float[Tensor, " P"]:
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def _pair_metrics(
    rewards: Float[Tensor, " S"], scored: ScoredSamples, num_pairs: int
) -> dict[str, Tensor]:
    """Compute shares of the means that trl reports under these names."""
    chosen, rejected = _split_pairs(rewards.detach())
    chosen_log_probs, rejected_log_probs = _split_pairs(scored.sums.detach())
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_log_probs,
        "logps/rejected": rejected_log_probs,
    }
    return {name: value.sum() / num_pairs for name, value in values.items()}


@dataclass
class Reference:
    """What a job is held at: the base model (None), or an adapter next to it."""

    # No second model is loaded: the reference's rows go through the same base model. Its log p of
    # a sample never changes, so each sample is scored once, when it is first needed.
    adapter_name: str | None = None
    log_probs: dict[int, float] = field(default_factory=dict)  # summed over a sample's labels

    def of(self, examples: Sequence[Example]) -> list[float]:
        return [self.log_probs[example.sample_id] for example in examples]


def scored_samples(
    log_probs: Float[Tensor, " N"], examples: Sequence[Example], reference: Reference | None
) -> ScoredSamples:
    references = None if reference is None else log_probs.new_tensor(reference.of(examples))
    num_labels = [count_labels(example) for example in examples]
    names = {name for example in examples for name in example.extras}
    extras = {name: [example.extras.get(name) for example in examples] for name in names}
    return ScoredSamples(log_probs, num_labels, references, extras)


def load_reference(host: Host, config: ObjectiveConfig) -> Reference | None:
    """Make the reference of an objective; an adapter is loaded once, however many jobs name it."""
    if not isinstance(config, DpoConfig):
        return None
    if config.reference == BASE_REFERENCE:
        return Reference()
    name = f"reference-{hashlib.sha256(config.reference.encode()).hexdigest()[:16]}"
    if name not in host.adapters:
        try:
            host.load(name, config.reference)
        except AdapterError:
            if name not in host.adapters:  # another thread has not loaded it meanwhile
                raise
    return Reference(name)


def drop_reference(
    host: Host, reference: Reference | None, needed: Iterable[Reference | None]
) -> None:
    """Take a reference's adapter off the host, unless a needed reference has the same adapter."""
    name = None if reference is None else reference.adapter_name
    if name is None or name not in host.adapters:
        return
    if not any(kept is not None and kept.adapter_name == name for kept in needed):
        host.remove(name)


def score_references(
    host: Host, samples: Iterable[tuple[Reference | None, Sequence[Example]]]
) -> None:
    """Let references score the samples that they haven't scored yet, all in the same forwards."""
    missing: list[tuple[Reference, Example]] = []
    for reference, examples in samples:
        if reference is not None:
            new = [row for row in examples if row.sample_id not in reference.log_probs]
            missing += [(reference, row) for row in new]
    if not missing:
        return
    log_probs = label_log_probs(host, [(ref.adapter_name, example) for ref, example in missing])
    for (reference, example), values in zip(missing, log_probs, strict=True):
        reference.log_probs[example.sample_id] = float(values.sum())
