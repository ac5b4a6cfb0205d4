"""The verbs of a training loop of one's own: forward_backward, optim_step, sample, save_state.

They are those of the Tinker API (tinker-docs.thinkingmachines.ai), but run in this process and are
done when they return. Steps, objectives and optimizers are those of `loraloom train`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters import AdapterConfig
from loraloom.adapters.contract import Adapter
from loraloom.config.data import PromptForm
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
from loraloom.training.settings import OBJECTIVES, ObjectiveConfig, OptimizerConfig
from loraloom.training.step import objectives, optimizers
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, Window
from loraloom.training.step.fused import forward_backward, gradients_set_aside

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
    """What an adapter is to learn from next."""

    adapter: Adapter
    data: Sequence[TrainingExample]
    objective: objectives.Objective  # its means are over all of the data
    sample_key: Callable[[int], int]  # from a row's place to the key of its dropout
    reference: objectives.Reference | None = None
    micro_batch_size: int | None = None  # examples in a forward; None for all
    loss_scale: optimizers.LossScale | None = None  # in float16, as it is at the computation


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
        self._forwards = self._draws = 0
        if any(client.host is host and client.name == name for client in _OPEN):
            raise AdapterError(f"adapter {name!r} has another TrainingClient; close that client")
        self._optimizer_config = optimizer or OptimizerConfig()
        self._added = adapter is not None
        self.adapter = host.adapter(name) if adapter is None else host.add(name, adapter, seed)
        self.parameters = dict(self.adapter.named_parameters())
        try:
            self._optimizer = optimizers.build_optimizer(self._optimizer_config, self.adapter)
        except BaseException:
            if self._added:
                host.remove(name)
            raise
        if prompt_form is not None:
            self.adapter.prompt = prompt_form
        self._loss_scale = optimizers.make_loss_scale(host)
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

        def terms(
            scored: objectives.ScoredSamples, totals: objectives.StepTotals
        ) -> objectives.ObjectiveTerms:
            found: Any = loss_fn(data, scored.by_sample)
            loss, metrics = found if isinstance(found, tuple) else (found, None)
            if (
                metrics is None
                or not isinstance(loss, Tensor)
                or loss.numel() != 1
                or not loss.requires_grad
            ):
                raise TrainingError(
                    "loss_fn must return a scalar tensor that depends on the log-probabilities, "
                    f"and metrics; got {found!r}"
                )
            return objectives.ObjectiveTerms(loss.reshape(()), metrics)

        key = self._next_sample_key()
        request = Request(self.adapter, data, terms, key, loss_scale=self._loss_scale)
        return run_requests(self.host, [request], self.pad_id)[0]

    def request(
        self,
        data: Sequence[TrainingExample],
        objective: ObjectiveChoice = "sft",
        *,
        micro_batch_size: int | None = None,
    ) -> Request:
        """Prepare a `forward_backward` for `run_requests`, which runs several clients at once."""
        known = {kind.model_fields["name"].default: kind for kind in OBJECTIVES}
        if isinstance(objective, str) and objective not in known:
            raise ConfigError(f"objective must be {' or '.join(known)}, got {objective!r}")
        config = known[objective]() if isinstance(objective, str) else objective
        wanted = (PreferencePair if config.learns_from_pairs else Example).__name__
        if given := ", ".join(sorted({type(one).__name__ for one in data} - {wanted})):
            raise ConfigError(f"data for {config.name} must be of {wanted}, got {given}")
        reference = objectives.load_reference(self.host, config)
        if reference is not None:
            self.references[reference.adapter_name] = reference
        terms, keys = objectives.build_objective(config), self._next_sample_key()
        return Request(
            self.adapter, data, terms, keys, reference, micro_batch_size, self._loss_scale
        )

    def optim_step(
        self, learning_rate: float | None = None, max_grad_norm: float | None = None
    ) -> OptimStepOutput:
        """Take an optimizer step and reset the gradients."""
        # A learning rate holds from now on. The norm of the adapter's whole gradient is clipped to
        # `max_grad_norm`. Without a finite gradient it is a TrainingError, and weights stay.
        clips = max_grad_norm is None or max_grad_norm > 0
        if not (clips and 0 <= (learning_rate or 0) < math.inf):
            raise ConfigError(
                "learning_rate must be finite and 0 or more, max_grad_norm above 0 (None for no "
                f"clipping), got {learning_rate} and {max_grad_norm}"
            )
        if learning_rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_ratio"]
        scale = self._loss_scale
        if all(weight.grad is None for weight in self.parameters.values()):
            raise TrainingError(
                f"adapter {self.name}: optim_step() found no gradients; call forward_backward()"
            )
        how = self._optimizer_config, self.adapter
        grad_norm = optimizers.clip_gradients(*how, max_grad_norm, scale)
        is_skipped = scale is not None and not scale.takes(grad_norm)
        if not (is_skipped or math.isfinite(grad_norm)):
            self.zero_grad()
            raise TrainingError(
                f"adapter {self.name}: gradient norm must be finite, got {grad_norm}; skipped"
            )
        if not is_skipped:
            with optimizers.rates_of_their_own(*how):
                self._optimizer.step()
        self.step += 1
        self.zero_grad()
        return OptimStepOutput(self.step, grad_norm, is_skipped)

    def zero_grad(self) -> None:
        """Drop the gradients since the last step."""
        self._optimizer.zero_grad(set_to_none=True)

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
            wanted = "prompts must be a list of texts, and num_samples 1 or more"
            raise ConfigError(f"{wanted}, got {shown(prompts)} and {num_samples}")
        # A prompt is the user's turn of the chat template where there is one; with `raw` it is read
        # as it stands. Each call has another seed: equal calls would draw the same completions.
        sampling = sampling or SamplingConfig()
        self._draws += 1
        seed = sample_key(sampling.seed, self.seed, self._draws) % 2**63
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
        state = optimizers.learning_state(self.parameters, self._optimizer)
        state |= {"step": self.step, "forwards": self._forwards, "draws": self._draws}
        state["loss_scale"] = None if self._loss_scale is None else asdict(self._loss_scale)
        records = {_STATE: checkpoints.JobRecord(self._settings())}
        checkpoint = checkpoints.Checkpoint(
            self.step, 0.0, checkpoints.describe_base(self.host), records
        )
        states = checkpoints.CheckpointStore(Path(os.path.expanduser(directory)))
        states.write(checkpoint, {_STATE: state}, keep=1)

    def load_state(self, directory: str | Path) -> None:
        """Resume from a saved state of this client, or of one with equal settings."""
        snapshot, faults = checkpoints.CheckpointStore(Path(os.path.expanduser(directory))).newest()
        if snapshot is None or _STATE not in snapshot.jobs:
            reason = "; ".join(faults) or "no checkpoint was found"
            raise ConfigError(f"{directory} must contain a client's saved state: {reason}")
        base = checkpoints.describe_base(self.host, snapshot.base)
        changed = checkpoints.describe_changes(snapshot.base, base, "base")
        saved = checkpoints.as_of_now(snapshot.jobs[_STATE].settings)
        changed += checkpoints.describe_changes(saved, self._settings())
        if changed:
            raise ConfigError(f"settings must be those of the state: {'; '.join(changed)}")
        state: Any = snapshot.load_state(_STATE)
        optimizers.load_learning_state(self.parameters, self._optimizer, state)
        self.step, self._forwards, self._draws = state["step"], state["forwards"], state["draws"]
        if self._loss_scale is not None:
            self._loss_scale = optimizers.LossScale(**state["loss_scale"])

    def close(self) -> None:
        """Free the optimizer and references, and remove the adapter if this client added it."""
        self.zero_grad()
        self._optimizer.state.clear()
        if self._added and self.host.adapters.get(self.name) is self.adapter:
            self.host.remove(self.name)
        _OPEN.discard(self)
        clients = [client for client in _OPEN if client.host is self.host]
        others = [one for client in clients for one in client.references.values()]
        for reference in self.references.values():
            objectives.drop_reference(self.host, reference, others)
        self.references.clear()

    def _next_sample_key(self) -> Callable[[int], int]:
        self._forwards += 1  # so that each call has other masks
        return partial(sample_key, self.seed, self._forwards)

    def _settings(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter.config.model_dump(mode="json"),
            "optimizer": self._optimizer_config.model_dump(mode="json"),
            "seed": self.seed,
        }


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
    names = [request.adapter.name for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"requests must each be of another adapter, got {', '.join(names)}; put an adapter's "
            "data into one request, or call run_requests again"
        )
    log_probs: list[list[Tensor]] = [[] for _ in requests]
    queues = [_micro_batches(*pair) for pair in zip(requests, log_probs, strict=True)]
    totals = [MicroBatchLoss(0.0) for _ in requests]
    with gradients_set_aside([request.adapter for request in requests]):
        for micro_batches in zip_longest(*queues):
            places = [place for place, batch in enumerate(micro_batches) if batch is not None]
            losses = forward_backward(host, [micro_batches[place] for place in places], pad_id)
            for place, loss in zip(places, losses, strict=True):
                totals[place] += loss
    faults = []
    for request, total in zip(requests, totals, strict=True):
        value = total.loss + total.aux_loss
        if not math.isfinite(value):
            request.adapter.zero_grad(set_to_none=True)
            fault = f"loss must be finite, got {value}; the gradients are dropped"
            faults.append(f"adapter {request.adapter.name}: {fault}")
    if faults:
        raise TrainingError("\n".join(faults))
    return [
        ForwardBackwardOutput(total.loss, total.aux_loss, total.metrics, own)
        for total, own in zip(totals, log_probs, strict=True)
    ]


def number_rows(data: Sequence[TrainingExample]) -> list[Example]:
    rows = [row for example in data for row in example.rows]
    return [replace(row, sample_id=place) for place, row in enumerate(rows)]


def _micro_batches(request: Request, log_probs: list[Tensor]) -> list[MicroBatch]:
    def recorded(
        scored: objectives.ScoredSamples, totals: objectives.StepTotals
    ) -> objectives.ObjectiveTerms:
        log_probs.extend(values.detach().cpu() for values in scored.by_sample)
        return request.objective(scored, totals)

    if not request.data or not all(row.input_ids for one in request.data for row in one.rows):
        which = "one without tokens" if request.data else "none"
        raise ConfigError(f"adapter {request.adapter.name}: data must have examples, got {which}")
    size = len(request.data) if request.micro_batch_size is None else request.micro_batch_size
    if size < 1:
        raise ConfigError(
            f"adapter {request.adapter.name}: micro_batch_size must be 1 or more, got {size}"
        )
    window = Window(0, tuple(request.data), size)
    rows = iter(number_rows(request.data))
    scale = 1.0 if request.loss_scale is None else request.loss_scale.scale
    micro_batches = []
    for index in range(window.num_micro_batches):
        examples = [next(rows) for _ in window.micro_batch(index)]
        keys = [request.sample_key(example.sample_id) for example in examples]
        parts = (request.adapter, examples, keys, window, recorded, request.reference)
        micro_batches.append(MicroBatch(*parts, loss_scale=scale))
    return micro_batches


def example_of(ids: Sequence[int], is_learnt: Sequence[bool]) -> Example:
    """Make a training example from token IDs and a loss mask."""
    pairs = zip(ids, is_learnt, strict=True)
    labels = (token if learnt else tokens.NO_LOSS for token, learnt in pairs)
    return Example(tuple(ids), tuple(labels), sample_id=0)


def example_of_completion(completion: Completion) -> Example:
    """Make a training example from a sample, whose tokens and end token are the labels."""
    prompt, ids = completion.prompt_ids, completion.ids
    return example_of([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))
