"""Showing how an evaluation gets on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loraloom.data.tasks import ChoiceQuestion

PLAIN_INTERVAL_S = 10.0
_SPEED_PERIOD_S = 300.0
"""The time over which the speed is averaged: some batches even of a large model."""

Advance = Callable[[Sequence[int]], None]
"""Takes the places of items that are done."""


class EvaluationProgress:
    """Shows what is done and the time left.

    On a terminal each task has a bar, which disappears at the end. Items weigh by their size, as
    the largest come first.
    """

    def __init__(
        self,
        console: Console,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console
        self._interval_s = interval_s
        self._clock = clock
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[num_done]}/{task.fields[num_items]} {task.fields[unit]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_SPEED_PERIOD_S,
            transient=True,
            get_time=clock,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> EvaluationProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, name: str, sizes: Sequence[int], unit: str = "questions") -> Advance:
        """Begin to show a task."""
        total = len(sizes)
        fields = {"num_done": 0, "num_items": total, "unit": unit}
        task_id = self._bars.add_task(name, total=sum(sizes), **fields)
        task = self._bars.tasks[task_id]
        num_done, shown_at = 0, self._clock()

        def advance(places: Sequence[int]) -> None:
            nonlocal num_done, shown_at
            num_done += len(places)
            size = sum(sizes[place] for place in places)
            self._bars.update(task_id, advance=size, num_done=num_done)
            is_due = self._clock() - shown_at >= self._interval_s and num_done < total
            if is_due and not self._console.is_terminal:
                shown_at = self._clock()
                eta = _duration(task.time_remaining)
                line = f"{name}: {num_done}/{total} {unit}, ETA {eta}"
                self._console.print(line, soft_wrap=True)

        return advance


def _duration(seconds: int | float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))


def question_size(question: ChoiceQuestion) -> int:
    """Characters that the model reads: different contexts once, and every continuation."""
    return sum(map(len, {*question.contexts})) + sum(map(len, question.continuations))
