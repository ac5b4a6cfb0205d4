"""Showing how jobs get on: a live line for each on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichBars

from loraloom.training.run.ranking import Ranking, ranking_line, ranking_table
from loraloom.training.step.micro_batch import padding_share

PLAIN_INTERVAL_S = 5.0
PLAIN_WIDTH = 400
"""Room for a table in a file, where lines do not end."""
_RATE_STEPS = 20


@dataclass(frozen=True)
class JobProgress:
    """How far a job is.

    Args:
        name: Of the job.
        step: Steps done.
        total_steps: Steps of the whole job.
        tokens: Real tokens learnt from.
        loss: Of the last step; None before the first.
        computed_tokens: Those that went through the model, with padding.
    """

    name: str
    step: int
    total_steps: int
    tokens: int
    loss: float | None = None
    computed_tokens: int = 0


class Progress(ABC):
    """Shows a run to its user."""

    @abstractmethod
    def start(self) -> None:
        """Begin to show."""

    @abstractmethod
    def add(self, job: JobProgress) -> None:
        """Show one more job."""

    @abstractmethod
    def update(self, job: JobProgress) -> None:
        """Show a job after a step."""

    @abstractmethod
    def rank(self, ranking: Ranking) -> None:
        """Show how the jobs of a sweep stand, in place of each by itself."""

    @abstractmethod
    def conclude(self, ranking: Ranking) -> None:
        """Show how the jobs of a sweep stand in the end."""

    @abstractmethod
    def message(self, text: str) -> None:
        """Say something."""

    @abstractmethod
    def stop(self) -> None:
        """Show nothing more."""


class Rate:
    """Tokens and steps a second, over the last steps."""

    def __init__(self):
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_RATE_STEPS + 1)

    def add(self, job: JobProgress) -> None:
        """Take in where a job is now."""
        self._marks.append((time.monotonic(), job.step, job.tokens))

    @property
    def tokens_per_s(self) -> float | None:
        """None before there are two marks."""
        return self._slope(2)

    def remaining(self, job: JobProgress) -> str:
        """Return the time until the job's last step, as h:mm:ss."""
        steps_per_s = self._slope(1)
        if not steps_per_s:
            return "-:--:--"
        return str(timedelta(seconds=round((job.total_steps - job.step) / steps_per_s)))

    def _slope(self, column: int) -> float | None:
        if len(self._marks) < 2:
            return None
        first, last = self._marks[0], self._marks[-1]
        elapsed = last[0] - first[0]
        return (last[column] - first[column]) / elapsed if elapsed > 0 else None


class _Bars(RichBars):
    """A line for each task, and perhaps a table under them."""

    table: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown."""
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


class LiveProgress(Progress):
    """A line for each job that is kept up to date.

    Args:
        console: A terminal.
    """

    def __init__(self, console: Console):
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TextColumn("padding {task.fields[padding]}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._rates: dict[str, Rate] = {}

    def start(self) -> None:
        """Begin to draw."""
        self._bars.start()

    def add(self, job: JobProgress) -> None:
        """Give a job a line."""
        self._rates[job.name] = rate = Rate()
        rate.add(job)
        self._tasks[job.name] = self._bars.add_task(
            job.name, total=job.total_steps, completed=job.step, **_fields(job, rate)
        )

    def update(self, job: JobProgress) -> None:
        """Show a job after a step."""
        rate = self._rates[job.name]
        rate.add(job)
        self._bars.update(self._tasks[job.name], completed=job.step, **_fields(job, rate))

    def rank(self, ranking: Ranking) -> None:
        """Show a table under the lines."""
        for one in ranking.standings:
            if one.name in self._tasks:
                self._bars.update(self._tasks[one.name], visible=False)
        self._bars.table = ranking_table(ranking)

    def conclude(self, ranking: Ranking) -> None:
        """Print the table."""
        self._bars.console.print(ranking_table(ranking))

    def message(self, text: str) -> None:
        """Print above the lines."""
        self._bars.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the lines as they are, without the table."""
        self._bars.table = None
        self._bars.stop()


class PlainProgress(Progress):
    """Lines of text: each job every few seconds, and at its last step.

    Args:
        console: Where they go.
        interval_s: Least time between two lines of a job.
    """

    def __init__(self, console: Console, interval_s: float = PLAIN_INTERVAL_S):
        self._console = console
        self._interval_s = interval_s
        self._rates: dict[str, Rate] = {}
        self._shown_at: dict[str, float] = {}
        self._ranking: Ranking | None = None
        self._ranked_at = 0.0

    def start(self) -> None:
        """Nothing is to do yet."""

    def add(self, job: JobProgress) -> None:
        """Begin to measure."""
        self._rates[job.name] = rate = Rate()
        rate.add(job)
        self._shown_at[job.name] = time.monotonic()

    def update(self, job: JobProgress) -> None:
        """Print a line if it is time."""
        rate, now = self._rates[job.name], time.monotonic()
        rate.add(job)
        if self._ranking is not None and job.name in self._ranking.names:
            return
        if job.step < job.total_steps and now - self._shown_at[job.name] < self._interval_s:
            return
        self._shown_at[job.name] = now
        fields = _fields(job, rate)
        self.message(
            f"{job.name}: step {job.step}/{job.total_steps}, loss {fields['loss']}, "
            f"{fields['rate']} tokens/s, padding {fields['padding']}, ETA {fields['eta']}"
        )

    def rank(self, ranking: Ranking) -> None:
        """Print a line if it is time, or if something was measured or ended."""
        before, now = self._ranking, time.monotonic()
        self._ranking = ranking
        is_news = before is None or before.measured != ranking.measured
        if not is_news and now - self._ranked_at < self._interval_s:
            return
        self._ranked_at = now
        self.message(ranking_line(ranking))

    def conclude(self, ranking: Ranking) -> None:
        """Print the table, as wide as it is."""
        Console(file=self._console.file, width=PLAIN_WIDTH).print(ranking_table(ranking))

    def message(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing is left to do."""


class NoProgress(Progress):
    """Shows nothing."""

    def start(self) -> None:
        """Show nothing."""

    def add(self, job: JobProgress) -> None:
        """Show nothing."""

    def update(self, job: JobProgress) -> None:
        """Show nothing."""

    def rank(self, ranking: Ranking) -> None:
        """Show nothing."""

    def conclude(self, ranking: Ranking) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


def console_progress(console: Console) -> Progress:
    """Choose live lines for a terminal and plain ones for anything else."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """Write metrics as `eval/loss 1.2345, ...`."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _fields(job: JobProgress, rate: Rate) -> dict[str, Any]:
    tokens_per_s = rate.tokens_per_s
    return {
        "loss": "-" if job.loss is None else f"{job.loss:.4f}",
        "rate": "-" if tokens_per_s is None else f"{tokens_per_s:.0f}",
        "padding": f"{100 * padding_share(job.tokens, job.computed_tokens):.1f} %",
        "eta": rate.remaining(job),
    }
