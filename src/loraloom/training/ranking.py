"""How the jobs of a sweep stand: who is ahead, who goes on after a rung, and the table of it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from loraloom.errors import plain
from loraloom.terminal import make_table
from loraloom.training.job import metric_mode
from loraloom.training.sweep_settings import format_value, format_values

RUNNING = "running"


@dataclass(frozen=True)
class Standing:
    """How a job of a sweep stands.

    Args:
        name: Of the job.
        parameters: What the sweep varies, by path.
        status: running, or what became of it.
        steps: Steps done.
        total_steps: Of the whole job, where known.
        rung_values: The metric at each rung that it reached, by step.
        value: The metric of the weights in its files; while it trains, that of its last evaluation.
        seconds: Wall time of the run until its end or now.
    """

    name: str
    parameters: Mapping[str, Any]
    status: str = RUNNING
    steps: int = 0
    total_steps: int | None = None
    rung_values: Mapping[int, float] = field(default_factory=dict)
    value: float | None = None
    seconds: float = 0.0

    @property
    def is_running(self) -> bool:
        """Whether it trains."""
        return self.status == RUNNING

    @property
    def passed_rungs(self) -> int:
        """Rungs after which it went on."""
        return len(self.rung_values) - (self.status == "stopped")

    @property
    def progress(self) -> str:
        """Steps done of all, where these are known."""
        return f"{self.steps}" if self.total_steps is None else f"{self.steps}/{self.total_steps}"


@dataclass(frozen=True)
class Ranking:
    """The jobs of a sweep in their order.

    Args:
        metric: What ranks them.
        rungs: Steps after which they are compared.
        standings: Those that have begun, in the order of the sweep.
        num_jobs: Jobs of the whole sweep.
    """

    metric: str
    rungs: tuple[int, ...]
    standings: tuple[Standing, ...]
    num_jobs: int

    @property
    def names(self) -> set[str]:
        """Names of the jobs."""
        return {one.name for one in self.standings}

    @property
    def measured(self) -> list[tuple[Any, ...]]:
        """What a ranking rests on; it changes when something was measured or ended."""
        return [(one.status, one.value, dict(one.rung_values)) for one in self.standings]

    @property
    def ranked(self) -> list[Standing]:
        """Those at their own end, then those that passed most rungs; by the metric among them."""
        sign = 1 if metric_mode(self.metric) == "min" else -1

        def key(one: Standing) -> tuple[bool, bool, float, float]:
            value = 0.0 if one.value is None else one.value
            has_ended = one.status in ("finished", "stopped early")  # no rung was left to it
            rungs = math.inf if has_ended else one.passed_rungs
            return one.status == "failed", one.value is None, -rungs, sign * value

        return sorted(self.standings, key=key)

    @property
    def best(self) -> Standing | None:
        """The first; None before anything is measured."""
        first = self.ranked[0]
        return None if first.value is None else first


def ranking_csv(ranking: Ranking) -> str:
    """A line for each job, in the order of the sweep."""
    text = io.StringIO()
    parameters = list(ranking.standings[0].parameters)
    rungs = [f"{ranking.metric}@{rung}" for rung in ranking.rungs]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["name", "rank", "status", "steps", *parameters, *rungs, ranking.metric, "seconds"]
    )
    ranks = {one.name: place for place, one in enumerate(ranking.ranked, start=1)}
    for one in ranking.standings:
        values = [one.rung_values.get(rung) for rung in ranking.rungs]
        writer.writerow(
            [
                *(one.name, ranks[one.name], one.status, one.steps),
                *map(format_value, one.parameters.values()),
                *("" if value is None else value for value in (*values, one.value)),
                f"{one.seconds:.1f}",
            ]
        )
    return text.getvalue()


def ranking_table(ranking: Ranking) -> Table:
    """The jobs for people, the best first."""
    parameters = [Text(path) for path in ranking.standings[0].parameters]
    rungs = [f"@{rung}" for rung in ranking.rungs]
    titles = [*parameters, "steps", *rungs, Text(ranking.metric), "status"]
    table = make_table("", "job", values=titles)
    for place, one in enumerate(ranking.ranked, start=1):
        values = (*(one.rung_values.get(rung) for rung in ranking.rungs), one.value)
        style = None if one.is_running or one.status.startswith("finished") else "dim"
        table.add_row(
            *(str(place), one.name, *map(_cell, one.parameters.values()), one.progress),
            *("-" if value is None else f"{value:.4f}" for value in values),
            one.status,
            style=style,
        )
    return table


def _cell(value: Any) -> Text:
    """A parameter's value as it stands: a template may look like rich's markup."""
    return Text(plain(format_value(value)))


def ranking_line(ranking: Ranking) -> str:
    """The state of a sweep in a line."""
    running = [one for one in ranking.standings if one.is_running]
    line = f"sweep: {len(running)} of {ranking.num_jobs} jobs train"
    if running:
        line += f", at step {max(running, key=lambda one: one.steps).progress}"
    best = ranking.best
    if best is not None:
        line += f"; best {best.name} ({format_values(best.parameters)}), "
        line += f"{ranking.metric} {best.value:.4f}"
    return line
