"""A job as the process that gives the orders sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraloom.config.job import JobConfig
from loraloom.training.cluster.worker import Measured
from loraloom.training.run.job import JobView, Position
from loraloom.training.run.results import JobResult, Status
from loraloom.training.step.micro_batch import padding_share


@dataclass(eq=False)
class RemoteJob(JobView):
    """A job that a worker trains, or that waits for one.

    Args:
        config: Its settings.
        measured: What a worker has found out about it.
        position: Where it stands, as far as it was told.
        milestones: Steps after which it is evaluated, beside every eval_steps and its end.
        first_round: The round of a sweep in which it began.
        is_shown: Whether the user has been shown it.
    """

    config: JobConfig
    measured: Measured
    position: Position = field(default_factory=Position)
    milestones: frozenset[int] = frozenset()
    first_round: int = 0
    is_shown: bool = False

    @property
    def total_steps(self) -> int:
        """Steps of the job, unless it is stopped early."""
        return self.measured.total_steps

    @property
    def held_out(self) -> str:
        """Hash of the examples that it is measured on."""
        return self.measured.held_out

    @property
    def round(self) -> int:
        """The round of a sweep that it has come to."""
        return self.round_at(self.position)

    def round_at(self, position: Position) -> int:
        """The round of a sweep in which it is at a position."""
        return self.first_round + position.micro_batches

    def result(
        self, status: Status, *, base_model: str, directory: str, seconds: float, reason: str
    ) -> JobResult:
        """Make up what became of it where no worker could tell; its snapshots have the weights."""
        position = self.position
        return JobResult(
            job=self.name,
            status=status,
            error=reason if status == "failed" else None,
            method=self.config.adapter.title,
            base_model=base_model,
            num_parameters=self.measured.num_parameters,
            steps=position.step,
            epochs=0.0,
            tokens=position.tokens,
            computed_tokens=position.computed_tokens,
            padding_share=round(padding_share(position.tokens, position.computed_tokens), 4),
            weights="last",
            metrics=dict(position.metrics),
            best=None,
            last_metrics=dict(position.metrics),
            data=self.measured.report,
            seconds=round(seconds, 3),
            peak_memory_bytes={},
            environment={},
            directory=directory,
            stop_reason=None if status == "failed" else reason,
        )
