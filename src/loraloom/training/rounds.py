"""Rounds: which jobs take part in one, and one that fails or is too large is done in parts.

A job that is alone when memory runs out has its micro-batch halved, example by whole example.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from loraloom import devices
from loraloom.errors import ConfigError, TrainingError
from loraloom.host.host import Host
from loraloom.training.job import Job
from loraloom.training.step import fused
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, lay_out

# Copies of trained weights that training makes later: gradients, two optimizer states, the last
# good ones, the best ones.
_LEARNING_COPIES = 5
_log = logging.getLogger(__name__)
# A job, and what it puts into the next round.
Turn = tuple[Job, MicroBatch]
# Micro-batches of one forward, with their indices in the round.
Group = list[tuple[int, MicroBatch]]


@dataclass
class RoundRunner:
    """Runs rounds, and remembers how much fits."""

    host: Host
    pad_id: int
    memory_limit: int | None = None  # of an accelerator; None: all it has
    say: Callable[[str], None] = _log.warning
    max_tokens: int | None = None  # of a forward, with padding, since memory ran out
    max_alone: int | None = None  # of a forward of one job, since memory ran out in one

    def __post_init__(self) -> None:
        limit = self.memory_limit
        if limit is None:
            return
        device = self.host.device
        if not devices.has_separate_memory(device):
            raise ConfigError(
                f"memory_limit requires an accelerator with its own memory, got device {device}; "
                "remove memory_limit, and bound a step with train.micro_batch_size or "
                "max_tokens_per_step"
            )
        devices.limit_memory(device, limit)
        reserve = 0
        for adapter in self.host.adapters.values():
            trained = [weight for weight in adapter.parameters() if weight.requires_grad]
            reserve += _LEARNING_COPIES * sum(weight.nbytes for weight in trained)
        used = torch.accelerator.memory_allocated(device) + reserve
        if used >= limit:
            raise ConfigError(
                "memory_limit must hold what is loaded and what optimizers keep, "
                f"{used / 1e9:.2f} GB, got {limit / 1e9:.2f} GB; raise memory_limit, "
                "quantize the base model, or train fewer jobs at once"
            )

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchLoss | TrainingError]:
        pending: fused.Pending = []
        errors: dict[int, Exception] = {}
        waiting: list[Group] = [list(enumerate(micro_batches))]
        while waiting:
            group = [(index, batch) for index, batch in waiting.pop() if index not in errors]
            if group:  # its parts come next, in their order
                waiting += reversed(self._run_group(group, pending, errors))
        if len(errors) == len(micro_batches):
            self.raise_if_general(errors[0])  # of the first micro-batch
        self._clip_complete(micro_batches, pending, errors)
        outcomes: list[MicroBatchLoss | TrainingError] = []
        outcomes += fused.read_losses(self.host.ranks, pending, len(micro_batches))
        for index, error in errors.items():
            outcomes[index] = _training_error(micro_batches[index], error)
        return outcomes

    def _clip_complete(
        self, batches: Sequence[MicroBatch], pending: fused.Pending, errors: dict[int, Exception]
    ) -> None:
        """Sum the gradients of complete steps over ranks, and clip them."""
        ranks = self.host.ranks
        # A micro-batch done in parts has several losses; the last one is told the norm.
        for index, loss in dict(pending).items():
            batch = batches[index]
            if batch.clip_gradient is None or index in errors:
                continue
            fused.sum_gradient(ranks, batch.adapter)
            try:
                with ranks.together():
                    loss.grad_norm = batch.clip_gradient().to(loss.summands)
            except Exception as error:
                errors[index] = error

    def _run_group(
        self, group: Group, pending: fused.Pending, errors: dict[int, Exception]
    ) -> list[Group]:
        """Add a group's losses, or the error of a job alone; return the parts that are to do."""
        halves = _halves(group)
        num_tokens = _count_tokens(group)
        limit = self.max_alone if len(group) == 1 else self.max_tokens
        if halves and limit is not None and num_tokens > limit:
            return halves
        micro_batches = [micro_batch for _, micro_batch in group]
        adapters = [micro_batch.adapter for micro_batch in micro_batches]
        outcome: list[fused.UnreadLoss] | Exception
        try:
            with fused.gradients_set_aside(adapters):
                outcome = fused.add_gradients(self.host, micro_batches, self.pad_id)
        except torch.OutOfMemoryError:
            outcome = torch.OutOfMemoryError()  # the caught error holds on to activations
        except Exception as error:
            outcome = error
        if isinstance(outcome, list):
            pending += zip([index for index, _ in group], outcome, strict=True)
            return []
        if isinstance(outcome, torch.OutOfMemoryError):
            devices.free_memory()
            if halves:
                self._lower_limits(halves, num_tokens, is_alone=len(group) == 1)
                return halves
            outcome = _error_of_too_long(group[0][1])
        if len(group) > 1:  # which job fails is not known yet
            return halves
        ((index, _),) = group
        errors[index] = outcome
        return []

    def _lower_limits(self, halves: Sequence[Group], num_tokens: int, *, is_alone: bool) -> None:
        self.max_tokens = max(_count_tokens(half) for half in halves)
        if is_alone:
            self.max_alone = self.max_tokens
        self.say(
            f"warning: out of memory in a step of {num_tokens} tokens; training continues in "
            f"parts of at most {self.max_tokens} tokens"
        )

    def raise_if_general(self, fault: Exception) -> None:
        """Raise an error again if it also affects the base model (a lost device, for example)."""
        try:
            with torch.no_grad():
                self.host.hidden(torch.full((1, 1), self.pad_id, device=self.host.device))
        except Exception:
            raise fault from None


def _halves(group: Group) -> list[Group]:
    # Jobs are separated first, which changes nothing for any of them.
    if len(group) > 1:
        middle = (len(group) + 1) // 2
        return [group[:middle], group[middle:]]
    index, micro_batch = group[0]
    return [[(index, half)] for half in micro_batch.halves()]


def _count_tokens(group: Group) -> int:
    return sum(lay_out([micro_batch for _, micro_batch in group]).computed_tokens)


def _error_of_too_long(micro_batch: MicroBatch) -> TrainingError:
    longest = max(len(example.input_ids) for example in micro_batch.examples)
    return TrainingError(
        f"job {micro_batch.adapter.name}: an example of {longest} tokens does not fit into memory; "
        "the job's last good weights are kept; lower train.max_length, set "
        "train.gradient_checkpointing: true, or train fewer jobs at once"
    )


def _training_error(micro_batch: MicroBatch, error: Exception) -> TrainingError:
    if isinstance(error, TrainingError):
        return error
    name = micro_batch.adapter.name
    _log.error("job %s failed", name, exc_info=error)
    return TrainingError(
        f"job {name}: the forward or backward pass raised {type(error).__name__}: {error}; the "
        "job's last good weights are kept"
    )


def choose_turns(turns: Sequence[Turn], max_tokens: int | None) -> list[Turn]:
    """Choose a round's jobs, so that their computed tokens go by their priorities over time."""
    if max_tokens is None:
        return list(turns)
    chosen: list[Turn] = []
    for turn in sorted(turns, key=lambda turn: turn[0].position.level):
        batches = [batch for _, batch in (*chosen, turn)]
        if not chosen or sum(lay_out(batches).computed_tokens) <= max_tokens:
            chosen.append(turn)
    return [turn for turn in turns if turn in chosen]
