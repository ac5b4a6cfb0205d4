"""Which jobs take part in a round, when one can't hold them all.

Stride scheduling: a job's pass is the tokens that were computed for it, divided by its priority.
The job with the least pass goes first, and others fill what is left of the round, so that over time
each job has a share of the computed tokens in proportion to its priority. It is a function of the
passes alone, which snapshots keep: a resumed run chooses as an unbroken one.

Source:
    Waldspurger and Weihl 1995, Stride Scheduling, MIT/LCS/TM-528.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loraloom.errors import ConfigError
from loraloom.training.run.job import Job
from loraloom.training.step.micro_batch import MicroBatch
from loraloom.training.step.rows import lay_out


class Schedule:
    """Packs micro-batches of several jobs into rounds of bounded size."""

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
