"""The verbs of your own training loop: forward_backward, optim_step, sample, save_state.

They are those of the Tinker API (tinker-docs.thinkingmachines.ai), but run in this process and are
done when they return. Steps, objectives and optimizers are those of `loraloom train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from loraloom.adapters import AdapterConfig
from loraloom.config.data import PromptForm
from loraloom.config.text import local_path
from loraloom.data import tokens
from loraloom.data.tokens import Example, PreferencePair, TrainingExample
from loraloom.errors import AdapterError, ConfigError, TrainingError, shown
from loraloom.generation.generate import Completion, complete, make_requests
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scoring import label_log_probs
from loraloom.host.host import Host
from loraloom.ops.dropout import sample_key
from loraloom.training import checkpoints
from loraloom.training.learner import Learner
from loraloom.training.settings import OBJECTIVES, ObjectiveConfig, OptimizerConfig
from loraloom.training.step import objectives
from loraloom.training.step.batch import MicroBatch, Window, rows_of
from loraloom.training.step.fused import add_gradients, gradients_set_aside, read_losses

# From data, and log p of each row's labels, differentiable, to a scalar loss of it, and metrics.
LossFunction = Callable[
    [Sequence[TrainingExample], Sequence[Tensor]], tuple[Tensor, Mapping[str, float | Tensor]]
]
# An objective with its settings, or its name for the defaults.
ObjectiveChoice = str | ObjectiveConfig
_STATE = "client"
# Clients that are not closed: those of one host may share references.
_OPEN: WeakSet[TrainingClient] = WeakSet()


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a forward and backward gave."""

    loss: float  # the objective's, over all data
    aux_loss: float  # router losses of a mixture, with coefficients
    metrics: dict[str, float]  # the objective's
    log_probs: list[Tensor]  # of the labels of each row, the rows of a pair in turn; on the CPU


@dataclass(frozen=True)
class Request:
    """What an adapter is to learn from next, and how: plain data."""

    adapter_name: str
    data: Sequence[TrainingExample]  # with their `extras`
    objective: ObjectiveConfig  # its means are over all of the data
    dropout_seeds: tuple[int, int] = (0, 0)  # with a row's index, the key of its dropout
    micro_batch_size: int | None = None  # examples in a forward; None for all


class OptimStepOutput(NamedTuple):
    """What `optim_step` did."""

    step: int  # calls of `optim_step` so far, as steps of a job: skipped ones count
    grad_norm: float  # before clipping
    is_skipped: bool = False  # as the gradient overflowed float16; losses are scaled by less now


class TrainingClient:
    """An adapter for your own training loop; several clients may share a host.

    Args:
        host: Base model with adapters.
        tokenizer: Tokenizer of the base model.
        name: Name of the adapter; for a new one a safe file name that is not taken.
        adapter: Configuration of a new adapter; None to train the host's adapter of this name,
            which `close` leaves on the host.
        optimizer: Optimizer, learning rate and weight decay.
        seed: Random seed for initial weights, dropout and samples.
        prompt_form: Form in which `sample` writes prompts, recorded in the adapter's files;
            `example` and `pair` read prompts without a template.

    Attributes:
        pad_id: Padding token, for `run_requests`.
        references: Reference models of the objectives by adapter name; None is the base model.

    Raises:
        ConfigError: If the name or an optimizer setting is not valid.
        AdapterError: If the name is taken, or the host has no adapter of this name to train.
    """

    def __init__(
        self,
        host: Host,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        adapter: AdapterConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        *,
        seed: int = 0,
        prompt_form: PromptForm | None = None,
    ):
        self.host = host
        self.tokenizer = tokenizer
        self.pad_id = tokens.pad_token(tokenizer)
        self.name = name
        self.seed = seed
        self.step = 0
        self.references: dict[str | None, objectives.Reference] = {}
        self._num_forwards = 0
        self._num_draws = 0
        if name in _open_clients(host):
            raise AdapterError(f"adapter {name!r} has another TrainingClient; close that client")
        self._added = adapter is not None
        self.adapter = host.adapter(name) if adapter is None else host.add(name, adapter, seed)
        try:
            self.learner = Learner(self.adapter, optimizer or OptimizerConfig(), host.dtype)
        except BaseException:
            if self._added:
                host.remove(name)
            raise
        self.parameters = self.learner.parameters
        if prompt_form is not None:
            self.adapter.prompt = prompt_form
        _OPEN.add(self)

    def example(self, prompt: str, completion: str) -> Example:
        """Encode a prompt and a completion, whose tokens and EOS are in the loss."""
        (example,) = tokens.learn_completions(self.tokenizer, [(prompt, completion)])
        return example

    def pair(self, prompt: str, chosen: str, rejected: str) -> PreferencePair:
        """Encode a better and a worse completion of a prompt; see `example`."""
        return PreferencePair(self.example(prompt, chosen), self.example(prompt, rejected))

    def forward(self, data: Sequence[TrainingExample]) -> list[Tensor]:
        """Compute log p of each row's labels, on the CPU, without gradients and dropout."""
        return label_log_probs(self.host, [(self.name, row) for row in number_rows(data)])

    def forward_backward(
        self,
        data: Sequence[TrainingExample],
        objective: ObjectiveChoice = "sft",
        *,
        micro_batch_size: int | None = None,
    ) -> ForwardBackwardOutput:
        """Add the gradient of an objective to the gradients since the last step.

        `sft` needs examples, `dpo` and `cpo` need pairs. Means are over all data, independent of
        `micro_batch_size`, the examples in one forward. A loss that is not finite raises a
        TrainingError and drops the gradients.
        """
        request = self.request(data, objective, micro_batch_size=micro_batch_size)
        return run_requests(self.host, [request], self.pad_id)[0]

    def forward_backward_custom(
        self, data: Sequence[TrainingExample], loss_fn: LossFunction
    ) -> ForwardBackwardOutput:
        """Add the gradient of your own loss, in one forward."""
        objective = _LossFunctionConfig(loss_fn=loss_fn, data=data)
        request = Request(self.name, data, objective, self._next_dropout_seeds())
        return run_requests(self.host, [request], self.pad_id)[0]

    def request(
        self,
        data: Sequence[TrainingExample],
        objective: ObjectiveChoice = "sft",
        *,
        micro_batch_size: int | None = None,
    ) -> Request:
        """Prepare a `forward_backward` for `run_requests`, which runs several clients at once."""
        kinds = {kind.model_fields["name"].default: kind for kind in OBJECTIVES}
        if isinstance(objective, str):
            if objective not in kinds:
                raise ConfigError(f"objective must be {' or '.join(kinds)}, got {objective!r}")
            objective = kinds[objective]()
        needed = (PreferencePair if objective.learns_from_pairs else Example).__name__
        unfit = {type(example).__name__ for example in data} - {needed}
        if unfit:
            got = ", ".join(sorted(unfit))
            raise ConfigError(f"data for {objective.name} must be of {needed}, got {got}")
        reference = objectives.load_reference(self.host, objective)
        if reference is not None:
            self.references[reference.adapter_name] = reference
        seeds = self._next_dropout_seeds()
        return Request(self.name, data, objective, seeds, micro_batch_size)

    def optim_step(
        self, learning_rate: float | None = None, max_grad_norm: float | None = None
    ) -> OptimStepOutput:
        """Take an optimizer step and reset the gradients."""
        # A learning rate holds from now on. The norm of the adapter's whole gradient is clipped to
        # `max_grad_norm`. Without a finite gradient it is a TrainingError, and weights stay.
        clips = max_grad_norm is None or max_grad_norm > 0
        if not clips or not 0 <= (learning_rate or 0) < math.inf:
            raise ConfigError(
                "learning_rate must be finite and 0 or more, max_grad_norm above 0 (None for no "
                f"clipping), got {learning_rate} and {max_grad_norm}"
            )
        if learning_rate is not None:
            self.learner.learning_rate = learning_rate
        if all(weight.grad is None for weight in self.parameters.values()):
            raise TrainingError(
                f"adapter {self.name}: optim_step() found no gradients; call forward_backward()"
            )
        grad_norm = float(self.learner.clip_gradient(max_grad_norm))
        is_skipped = self.learner.overflows(grad_norm)
        if not (is_skipped or math.isfinite(grad_norm)):
            self.zero_grad()
            raise TrainingError(
                f"adapter {self.name}: gradient norm must be finite, got {grad_norm}; skipped"
            )
        if not is_skipped:
            self.learner.apply()
        self.step += 1
        self.zero_grad()
        return OptimStepOutput(self.step, grad_norm, is_skipped)

    def zero_grad(self) -> None:
        """Drop the gradients since the last step."""
        self.learner.zero_grad()

    def sample(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | None = None,
        *,
        num_samples: int = 1,
        raw: bool = False,
    ) -> list[list[Completion]]:
        """Complete each prompt `num_samples` times, greedily by default."""
        if num_samples < 1 or isinstance(prompts, str):
            raise ConfigError(
                "prompts must be a list of texts, and num_samples 1 or more, got "
                f"{shown(prompts)} and {num_samples}"
            )
        # A prompt is the user's turn of the chat template where there is one; with `raw` it is read
        # as it stands. Each call has another seed: equal calls would draw the same completions.
        sampling = sampling or SamplingConfig()
        self._num_draws += 1
        seed = sample_key(sampling.seed, self.seed, self._num_draws) % 2**63
        drawn = sampling.model_copy(update={"seed": seed})
        copies = [Prompt(prompt, self.name) for prompt in prompts for _ in range(num_samples)]
        requests = make_requests(self.host, self.tokenizer, copies, drawn, raw=raw)
        completions = complete(self.host, self.tokenizer, requests)
        starts = range(0, len(completions), num_samples)
        return [completions[start : start + num_samples] for start in starts]

    def save(self, directory: str | Path) -> None:
        """Write the adapter's files to a directory that contains no adapter yet."""
        self.host.save(self.name, directory)

    def save_state(self, directory: str | Path) -> None:
        """Write the state that `load_state` resumes from; replace an earlier one."""
        state = self.learner.state_dict()
        state |= {"step": self.step, "forwards": self._num_forwards, "draws": self._num_draws}
        base = checkpoints.describe_base(self.host)
        records = {_STATE: checkpoints.JobRecord(self._settings())}
        checkpoint = checkpoints.Checkpoint(self.step, seconds=0.0, base=base, jobs=records)
        store = checkpoints.CheckpointStore(local_path(directory, "directory"))
        store.write(checkpoint, {_STATE: state}, keep=1)

    def load_state(self, directory: str | Path) -> None:
        """Resume from a saved state of this client, or of one with equal settings."""
        store = checkpoints.CheckpointStore(local_path(directory, "directory"))
        checkpoint, faults = store.newest()
        if checkpoint is None or _STATE not in checkpoint.jobs:
            reason = "; ".join(faults) or "no checkpoint was found"
            raise ConfigError(f"{directory} must contain a client's saved state: {reason}")
        base = checkpoints.describe_base(self.host, checkpoint.base)
        changed = checkpoints.describe_changes(checkpoint.base, base, "base")
        saved = checkpoints.as_of_now(checkpoint.jobs[_STATE].settings)
        changed += checkpoints.describe_changes(saved, self._settings())
        if changed:
            raise ConfigError(f"settings must be those of the state: {'; '.join(changed)}")
        state: Any = checkpoint.load_state(_STATE)
        self.learner.load_state_dict(state)
        self.step = state["step"]
        self._num_forwards = state["forwards"]
        self._num_draws = state["draws"]

    def close(self) -> None:
        """Free the optimizer and references, and remove the adapter if this client added it."""
        self.learner.release()
        if self._added and self.host.adapters.get(self.name) is self.adapter:
            self.host.remove(self.name)
        _OPEN.discard(self)
        clients = _open_clients(self.host).values()
        needed = [reference for client in clients for reference in client.references.values()]
        for reference in self.references.values():
            objectives.drop_reference(self.host, reference, needed)
        self.references.clear()

    def _next_dropout_seeds(self) -> tuple[int, int]:
        self._num_forwards += 1  # so that each call has other masks
        return self.seed, self._num_forwards

    def _settings(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter.config.model_dump(mode="json"),
            "optimizer": self.learner.config.model_dump(mode="json"),
            "seed": self.seed,
        }


def _open_clients(host: Host) -> dict[str, TrainingClient]:
    return {client.name: client for client in _OPEN if client.host is host}


class _LossFunctionConfig(ObjectiveConfig):
    loss_fn: Any
    data: Any

    name: Any = "loss_fn"

    @override
    def terms(self, scored: objectives.ScoredSamples, totals: Any) -> tuple[Any, Mapping[str, Any]]:
        return self.loss_fn(self.data, scored.by_sample)


def run_requests(
    host: Host, requests: Sequence[Request], pad_id: int
) -> list[ForwardBackwardOutput]:
    """Add the gradients of several adapters in shared forwards.

    Args:
        host: Base model with the adapters.
        requests: Requests of different adapters; each gets the gradient that it would get alone.
        pad_id: Padding token.

    Raises:
        ConfigError: If data is empty, or two requests are for the same adapter.
        Exception: Any error of a forward or backward; gradients are unchanged then.
        TrainingError: If losses are not finite. The gradients of the adapters in the message are
            dropped, those of the others are kept.
    """
    names = [request.adapter_name for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"requests must each be of another adapter, got {', '.join(names)}; put an adapter's "
            "data into one request, or call run_requests again"
        )
    log_probs: list[list[Tensor]] = [[] for _ in requests]
    pairs = zip(requests, log_probs, strict=True)
    queues = [_micro_batches(host, request, recorded) for request, recorded in pairs]
    adapters = [host.adapter(name) for name in names]
    pending = []
    with gradients_set_aside(adapters):
        for micro_batches in zip_longest(*queues):
            indices = [index for index, batch in enumerate(micro_batches) if batch is not None]
            losses = add_gradients(host, [micro_batches[index] for index in indices], pad_id)
            pending += zip(indices, losses, strict=True)
        totals = read_losses(host.ranks, pending, len(requests))
    faults = []
    for adapter, total in zip(adapters, totals, strict=True):
        value = total.loss + total.aux_loss
        if not math.isfinite(value):
            adapter.zero_grad(set_to_none=True)
            fault = f"loss must be finite, got {value}; the gradients are dropped"
            faults.append(f"adapter {adapter.name}: {fault}")
    if faults:
        raise TrainingError("\n".join(faults))
    return [
        ForwardBackwardOutput(total.loss, total.aux_loss, total.metrics, recorded)
        for total, recorded in zip(totals, log_probs, strict=True)
    ]


def _micro_batches(host: Host, request: Request, log_probs: list[Tensor]) -> list[MicroBatch]:
    objective = objectives.build_objective(request.objective)

    def recorded(
        scored: objectives.ScoredSamples, totals: objectives.StepTotals
    ) -> objectives.Terms:
        log_probs.extend(values.detach().cpu() for values in scored.by_sample)
        return objective(scored, totals)

    rows = number_rows(request.data)
    name = request.adapter_name
    if not rows or not all(row.input_ids for row in rows):
        fault = "one without tokens" if rows else "none"
        raise ConfigError(f"adapter {name}: data must have examples, got {fault}")
    size = len(rows) if request.micro_batch_size is None else request.micro_batch_size
    if size < 1:
        raise ConfigError(f"adapter {name}: micro_batch_size must be 1 or more, got {size}")
    client = _open_clients(host).get(name)
    batch = MicroBatch(
        host.adapter(name),
        rows,
        [sample_key(*request.dropout_seeds, row.sample_id) for row in rows],
        Window(0, tuple(request.data), size),
        recorded,
        objectives.load_reference(host, request.objective),
        loss_scale=1.0 if client is None else client.learner.loss_scale.scale,
    )
    return batch.divided()


def number_rows(data: Sequence[TrainingExample]) -> list[Example]:
    return [replace(row, sample_id=index) for index, row in enumerate(rows_of(data))]


def example_of(
    ids: Sequence[int],
    is_learnt: Sequence[bool],
    **extras: float | tuple[float, ...],
) -> Example:
    """Make a training example from token IDs and a loss mask; `extras` are for its objective."""
    pairs = zip(ids, is_learnt, strict=True)
    labels = tuple(token if learnt else tokens.NO_LOSS for token, learnt in pairs)
    return Example(tuple(ids), labels, extras=extras)


def example_of_completion(completion: Completion, **extras: float | tuple[float, ...]) -> Example:
    """Make a training example from a sample, whose tokens and end token are the labels."""
    prompt, ids = completion.prompt_ids, completion.ids
    return example_of([*prompt, *ids], [False] * len(prompt) + [True] * len(ids), **extras)
