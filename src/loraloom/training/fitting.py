"""Rounds: which jobs take part in one, and one that fails is done again in parts.

Jobs are parted first, which changes nothing for any of them. A job that is alone when memory runs
out has its micro-batch halved, example by whole example, down to one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch

from loraloom.errors import ConfigError, TrainingError
from loraloom.generation.scoring import free_memory
from loraloom.models.host import Host
from loraloom.training.job import Job
from loraloom.training.memory import MemoryWatch
from loraloom.training.step.batch import MicroBatch, MicroBatchLoss, lay_out
from loraloom.training.step.fused import (
    completed_weights,
    forward_backward,
    gradients_set_aside,
    sum_gradients,
)

_log = logging.getLogger(__name__)

Group = list[tuple[int, MicroBatch]]
"""Micro-batches of one forward, with their places in the round."""


class RoundRunner:
    """Runs rounds, and remembers how much fits.

    Attributes:
        max_tokens: Most tokens of a forward, with padding, since memory ran out; None before.
    """

    def __init__(
        self,
        host: Host,
        pad_id: int,
        memory_limit: int | None = None,
        say: Callable[[str], None] = _log.warning,
    ):
        self.max_tokens: int | None = None
        self._memory = MemoryWatch(host, memory_limit)
        self._say = say
        self._host = host
        self._pad_id = pad_id

    def run(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchLoss | TrainingError]:
        """Add each micro-batch's gradient to its adapter's, in one forward or in several."""
        ranks = self._host.ranks
        faults: list[Exception] = []
        losses = [MicroBatchLoss(0.0)] * len(micro_batches)
        errors: dict[int, TrainingError] = {}
        parted: set[int] = set()
        waiting: list[Group] = [list(enumerate(micro_batches))]
        while waiting:
            group = [item for item in waiting.pop() if item[0] not in errors]
            if not group:
                continue
            halves = _halves(group)
            if halves and self._is_too_large(group):
                waiting += halves[::-1]
                continue
            place, micro_batch = group[0]
            fault: Exception | None = None
            try:
                batches = [micro_batch for _, micro_batch in group]
                adapters = [batch.adapter for batch in batches]
                with (
                    gradients_set_aside(adapters, completed_weights(ranks, batches)),
                    self._watching(group),
                ):
                    outcome = forward_backward(self._host, batches, self._pad_id)
            except torch.OutOfMemoryError:
                outcome = None
            except Exception as error:
                outcome, fault = None, error
            if outcome is not None:
                for (place, part), loss in zip(group, outcome, strict=True):
                    losses[place] += loss
                    if part is not micro_batches[place]:
                        parted.add(place)
            elif fault is None:
                free_memory()  # the error, which holds on to the activations, is gone by now
                if halves:
                    self.max_tokens = max(map(_count_tokens, halves))
                    self._say(
                        f"warning: memory ran short in a step of {_count_tokens(group)} tokens; "
                        f"from now on steps are computed in parts of at most {self.max_tokens}"
                    )
                    waiting += halves[::-1]
                else:
                    errors[place] = _does_not_fit(micro_batch)
            elif len(group) > 1:
                waiting += halves[::-1]
            else:
                faults.append(fault)
                errors[place] = _training_error(micro_batch, fault)
        if faults and len(faults) == len(micro_batches):
            self.raise_if_general(faults[0])
        late = [micro_batches[place] for place in sorted(parted - errors.keys())]
        sum_gradients(ranks, completed_weights(ranks, late))
        return [errors.get(place, loss) for place, loss in enumerate(losses)]

    def raise_if_general(self, fault: Exception) -> None:
        """Raise an error again if it also affects the base model (a lost device, for example)."""
        one_token = torch.full((1, 1), self._pad_id, device=self._host.device)
        try:
            with torch.no_grad():
                self._host.hidden(one_token)
        except Exception:
            raise fault from None

    def _watching(self, group: Group) -> AbstractContextManager[None]:
        adapters = [micro_batch.adapter for _, micro_batch in group]
        return self._memory.watching(adapters, _count_tokens(group))

    def _is_too_large(self, group: Group) -> bool:
        return self.max_tokens is not None and _count_tokens(group) > self.max_tokens


def _halves(group: Group) -> list[Group]:
    """Part jobs, or the examples of a single one; nothing if there is only one example."""
    if len(group) > 1:
        middle = (len(group) + 1) // 2
        return [group[:middle], group[middle:]]
    return [[(place, half)] for place, micro_batch in group for half in micro_batch.halves()]


def _count_tokens(group: Group) -> int:
    return sum(lay_out([micro_batch for _, micro_batch in group]).computed_tokens)


def _training_error(micro_batch: MicroBatch, error: Exception) -> TrainingError:
    if isinstance(error, TrainingError):
        return error
    name = micro_batch.adapter.name
    _log.error("job %s failed", name, exc_info=error)
    return TrainingError(
        f"job {name}: its forward or backward pass raised {type(error).__name__}: {error}; its "
        "last good weights are kept"
    )


def _does_not_fit(micro_batch: MicroBatch) -> TrainingError:
    longest = max(len(example.input_ids) for example in micro_batch.examples)
    return TrainingError(
        f"job {micro_batch.adapter.name}: one example must fit into memory, one of {longest} "
        "tokens does not; its last good weights are kept; lower train.max_length, set "
        "train.gradient_checkpointing: true, or train fewer jobs at once"
    )


class Schedule:
    """Packs micro-batches of several jobs into rounds of bounded size.

    Stride scheduling: a job's pass is the tokens that were computed for it, divided by its
    priority. The job with the least pass goes first, and others fill what is left of the round, so
    that over time each job has a share of the computed tokens in proportion to its priority. It is
    a function of the passes alone, which snapshots keep: a resumed run chooses as an unbroken one.

    Source:
        Waldspurger and Weihl 1995, Stride Scheduling, MIT/LCS/TM-528.
    """

    def __init__(self, max_tokens_per_step: int | None = None):
        self.max_tokens_per_step = max_tokens_per_step
        self.passes: dict[str, float] = {}
        self._priorities: dict[str, float] = {}

    def check_fits(self, job: Job) -> None:
        """Check that a job can take part in a round."""
        limit, needed = self.max_tokens_per_step, job.order.max_micro_batch_tokens
        if limit is not None and needed > limit:
            raise ConfigError(
                f"job {job.name}: max_tokens_per_step must hold the job's longest micro-batch, "
                f"which has {needed} tokens with padding, got {limit}; raise it, or lower "
                "train.micro_batch_size or train.max_length"
            )

    def enter(self, job: Job) -> None:
        """Take a job in, level with the one that is furthest behind."""
        self.passes[job.name] = min(self.passes.values(), default=0.0)
        self._priorities[job.name] = job.config.priority

    def leave(self, name: str) -> None:
        """Forget a job."""
        del self.passes[name], self._priorities[name]

    def restore(self, passes: Mapping[str, float]) -> None:
        """Go on from the passes of a snapshot; jobs that it doesn't know join now."""
        least = min(passes.values(), default=0.0)
        self.passes = {name: passes.get(name, least) for name in self.passes}

    def choose(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Choose what goes into the next round."""
        if self.max_tokens_per_step is None:
            return list(micro_batches)
        chosen: list[MicroBatch] = []
        for micro_batch in sorted(micro_batches, key=lambda b: self.passes[b.adapter.name]):
            tokens = sum(lay_out([*chosen, micro_batch]).computed_tokens)
            if not chosen or tokens <= self.max_tokens_per_step:
                chosen.append(micro_batch)
        names = {micro_batch.adapter.name for micro_batch in chosen}
        return [batch for batch in micro_batches if batch.adapter.name in names]

    def charge(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Count a round that was made."""
        if self.max_tokens_per_step is None:
            return
        computed = lay_out(micro_batches).computed_tokens
        for micro_batch, tokens in zip(micro_batches, computed, strict=True):
            name = micro_batch.adapter.name
            self.passes[name] += tokens / self._priorities[name]
