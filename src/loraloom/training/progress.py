"""What a run says while it goes on: lines to the user, live on a terminal; metrics to trackers."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from loraloom.durable import sync
from loraloom.errors import plain
from loraloom.terminal import fitted, make_console, print_tables
from loraloom.training.job import Job, Position
from loraloom.training.outputs import RunDirectory
from loraloom.training.ranking import Ranking, ranking_line, ranking_table
from loraloom.training.step.batch import StepReport, padding_share
from loraloom.training.tracking import MetricsFile, Tracker, open_tracker, step_metrics

PLAIN_INTERVAL_S = 60.0
_MAX_JOBS_OF_A_LINE = 12
_SPEED_PERIOD_S = 120.0


class _Bars(RichProgress):
    """A line for each job, and perhaps a table under them."""

    table: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is shown."""
        yield from super().get_renderables()
        if self.table is not None:
            yield self.table


class Progress:
    """Shows a run to its user."""

    def __init__(self, console: Console | None = None, interval_s: float = PLAIN_INTERVAL_S):
        self._console = console or make_console(quiet=True)
        self._console.file = EnduringOutput(self._console.file)  # pyright: ignore
        self._is_live = console is not None and console.is_terminal
        self._interval_s = interval_s
        self._bars = _Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TextColumn("padding {task.fields[padding]}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
            disable=not self._is_live,
            speed_estimate_period=_SPEED_PERIOD_S,
        )
        self._tasks: dict[str, TaskID] = {}
        self._news: dict[str, tuple[int, Position]] = {}  # since the last plain line
        self._shown_at = time.monotonic()
        self._ranking: Ranking | None = None
        self._ranked_at = 0.0

    def start(self) -> None:
        """Begin to show."""
        self._bars.start()

    def add(self, name: str, total_steps: int, position: Position) -> None:
        """Show one more job."""
        start = position.step, position.tokens
        self._tasks[name] = self._bars.add_task(
            name,
            total=total_steps,
            completed=start[0],
            start_position=start,
            **dict.fromkeys(("loss", "rate", "padding", "eta"), "-"),
        )
        self._describe(name, position)

    def update(self, name: str, total_steps: int, position: Position) -> None:
        """Show a job after a step."""
        self._bars.update(self._tasks[name], completed=position.step)
        self._describe(name, position)
        if self._is_live:
            return
        if self._ranking is None or name not in self._ranking.names:
            self._news[name] = total_steps, position
        now = time.monotonic()
        is_end = all(task.finished for task in self._bars.tasks)
        if self._news and (is_end or now - self._shown_at >= self._interval_s):
            self._shown_at = now
            self.message(self._plain_line(self._news))
            self._news.clear()

    def _plain_line(self, jobs: Mapping[str, tuple[int, Position]]) -> str:
        """How jobs get on: one in detail, or the steps and losses of several."""
        fields = [self._bars.tasks[self._tasks[name]].fields for name in jobs]
        longest = max(fields, key=lambda told: (len(told["eta"]), told["eta"]))["eta"]
        rates = [float(told["rate"]) for told in fields if told["rate"] != "-"]
        rate = f"{sum(rates):.0f}" if rates else "-"
        lines = [
            f"{name}: step {position.step}/{total_steps}, loss {told['loss']}"
            for (name, (total_steps, position)), told in zip(jobs.items(), fields, strict=True)
        ][:_MAX_JOBS_OF_A_LINE]
        if len(jobs) > len(lines):
            lines.append(f"and {len(jobs) - len(lines)} more jobs")
        padding = f", padding {fields[0]['padding']}" if len(jobs) == 1 else ""
        return f"{'; '.join(lines)}, {rate} tokens/s{padding}, ETA {longest}"

    def rank(self, ranking: Ranking) -> None:
        """Show how the jobs of a sweep stand, in place of each by itself."""
        before, self._ranking = self._ranking, ranking
        if self._is_live:
            for name in ranking.names & self._tasks.keys():
                self._bars.update(self._tasks[name], visible=False)
            self._bars.table = Group(*fitted(ranking_table(ranking), self._console.width))
            return
        is_news = before is None or before.measured != ranking.measured
        now = time.monotonic()
        if is_news or now - self._ranked_at >= self._interval_s:
            self._ranked_at = now
            self.message(ranking_line(ranking))

    def conclude(self, ranking: Ranking) -> None:
        """Print how the jobs of a sweep stand in the end."""
        print_tables(self._console, [ranking_table(ranking)])

    def message(self, text: str) -> None:
        """Print a line, above the live ones."""
        wrap = not self._is_live
        self._console.print(plain(text), markup=False, emoji=False, highlight=False, soft_wrap=wrap)

    def stop(self) -> None:
        """Show nothing more; live lines stay as they are, without the table."""
        self._bars.table = None
        self._bars.stop()

    def _describe(self, name: str, position: Position) -> None:
        """Bring the fields of a job's line up to date."""
        task = self._bars.tasks[self._tasks[name]]
        first_step, first_tokens = task.fields["start_position"]
        rate, speed, remaining = "-", task.speed, task.time_remaining
        if speed is not None and position.step > first_step:
            tokens_per_step = (position.tokens - first_tokens) / (position.step - first_step)
            rate = f"{speed * tokens_per_step:.0f}"
        fields = {
            "loss": "-" if position.last_loss is None else f"{position.last_loss:.4f}",
            "rate": rate,
            "padding": f"{100 * padding_share(position.tokens, position.computed_tokens):.1f} %",
            "eta": "-:--:--" if remaining is None else str(timedelta(seconds=round(remaining))),
        }
        task.fields.update(fields)


class EnduringOutput(io.TextIOBase):
    """A stream that drops what a closed pipe or a full disk does not take."""

    def __init__(self, stream: Any):
        self.stream = stream

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the stream."""
        return self.stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Write a text as far as that is possible."""
        with suppress(OSError, ValueError):  # ValueError: it was closed
            encodable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self.stream.write(encodable)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self.stream.fileno()


class Reporter:
    """Tells trackers and the user how jobs get on. A tracker that fails is told of once a job."""

    def __init__(self, directory: RunDirectory, progress: Progress, tracker_names: tuple[str, ...]):
        self._directory = directory
        self._progress = progress
        self._tracker_names = [] if directory.is_read_only else ["jsonl", *tracker_names]
        self._trackers: dict[str, list[MetricsFile | Tracker]] = {}
        self._failing: set[tuple[str, str]] = set()
        self._is_started = False

    def start(self, jobs: Iterable[Job]) -> None:
        """Open the trackers of jobs and begin to show them."""
        self._is_started = True
        self._progress.start()
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> None:
        """Open a job's trackers and show it, if the run has begun."""
        if not self._is_started:
            return
        directory, config = self._directory.job(job.name), job.config.model_dump(mode="json")
        trackers = self._trackers[job.name] = []
        for name in dict.fromkeys(self._tracker_names):
            with self._noting_faults(name, job.name):
                trackers.append(open_tracker(name, directory, job.position.step + 1, config))
        self._progress.add(job.name, job.total_steps, job.position)

    def step(self, job: Job, report: StepReport, seconds: float) -> None:
        """Tell what a step did."""
        self._log(job.name, step_metrics(report, seconds))
        if self._is_started:
            self._progress.update(job.name, job.total_steps, job.position)
        for warning in report.warnings:
            self.message(f"warning: job {job.name}, {warning}")

    def evaluation(self, job: Job, metrics: Mapping[str, float], seconds: float) -> None:
        """Tell what was measured after a job's last step."""
        step = job.position.step
        place = {"step": step, "epoch": round(job.order.epochs_after(step), 4)}
        self._log(job.name, {**place, **metrics, "seconds": round(seconds, 3)})
        described = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.message(f"{job.name}: step {step}, {described}")

    def message(self, text: str) -> None:
        """Say something to the user."""
        self._progress.message(text)

    def end(self, job_name: str) -> None:
        """Close a job's trackers."""
        for tracker in self._trackers.pop(job_name, ()):
            with self._noting_faults(tracker.name, job_name):
                tracker.close()

    def stop(self) -> None:
        """Close all trackers and show nothing more."""
        self._is_started = False
        self._progress.stop()
        for name in list(self._trackers):
            self.end(name)

    def metrics_bytes(self, job_name: str) -> int:
        """Return the length of a job's metrics.jsonl, all of which is on the disk then."""
        metrics = self._directory.metrics(job_name)
        if not metrics.exists():
            return 0
        if job_name in self._trackers:
            sync(metrics)
        return metrics.stat().st_size

    @contextmanager
    def _noting_faults(self, tracker_name: str, job_name: str) -> Iterator[None]:
        """Tell of a tracker's fault (a full disk, for example) once; it ends no training."""
        try:
            yield
        except Exception as error:
            if (tracker_name, job_name) not in self._failing:
                self.message(f"warning: job {job_name}: {tracker_name} can't take metrics: {error}")
            self._failing.add((tracker_name, job_name))

    def _log(self, job_name: str, metrics: Mapping[str, Any]) -> None:
        for tracker in self._trackers.get(job_name, ()):
            with self._noting_faults(tracker.name, job_name):
                tracker.log(metrics)
