"""Showing how an evaluation gets on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichBars

from loraloom.data.examples import ChoiceQuestion

PLAIN_INTERVAL_S = 10.0
_RATE_BATCHES = 20


class TaskProgress:
    """How far a task is. Questions weigh by their length, as the longest come first.

    Args:
        name: Of the task.
        questions: All of it.
    """

    def __init__(self, name: str, questions: Sequence[ChoiceQuestion]):
        self.name = name
        self.num_questions = len(questions)
        self.num_done = 0
        self._sizes = [_size(question) for question in questions]
        self._left = sum(self._sizes)
        self._marks = deque([(time.monotonic(), self._left)], maxlen=_RATE_BATCHES + 1)

    def add(self, places: Sequence[int]) -> None:
        """Take in the questions that are done."""
        self.num_done += len(places)
        self._left -= sum(self._sizes[place] for place in places)
        self._marks.append((time.monotonic(), self._left))

    @property
    def remaining(self) -> str:
        """The time until the last question, as h:mm:ss."""
        (start, left_then), (now, left_now) = self._marks[0], self._marks[-1]
        if left_then == left_now:
            return "-:--:--"
        return str(timedelta(seconds=round(left_now * (now - start) / (left_then - left_now))))


class Progress(ABC):
    """Shows an evaluation to its user."""

    @abstractmethod
    def start(self, task: TaskProgress) -> None:
        """Begin to show a task."""

    @abstractmethod
    def update(self, task: TaskProgress) -> None:
        """Show a task after a batch."""


class LiveProgress(Progress):
    """A bar for each task.

    Args:
        bars: They are running.
    """

    def __init__(self, bars: RichBars):
        self._bars = bars

    def start(self, task: TaskProgress) -> None:
        """Add its bar."""
        self._task = self._bars.add_task(task.name, total=task.num_questions, eta="-:--:--")

    def update(self, task: TaskProgress) -> None:
        """Move its bar."""
        self._bars.update(self._task, completed=task.num_done, eta=task.remaining)


class PlainProgress(Progress):
    """Lines of text, every few seconds.

    Args:
        console: Where they go.
        interval_s: Least time between two lines.
    """

    def __init__(self, console: Console, interval_s: float = PLAIN_INTERVAL_S):
        self._console = console
        self._interval_s = interval_s

    def start(self, task: TaskProgress) -> None:
        """Begin to measure."""
        self._shown_at = time.monotonic()

    def update(self, task: TaskProgress) -> None:
        """Print a line if it is time."""
        now = time.monotonic()
        if now - self._shown_at < self._interval_s or task.num_done == task.num_questions:
            return
        self._shown_at = now
        self._console.print(
            f"{task.name}: {task.num_done}/{task.num_questions} questions, ETA {task.remaining}",
            soft_wrap=True,
        )


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """Show bars, which disappear at the end, on a terminal, and plain lines on anything else."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} questions"),
        TextColumn("ETA {task.fields[eta]}"),
    )
    with RichBars(*columns, console=console, transient=True) as bars:
        yield LiveProgress(bars)


def _size(question: ChoiceQuestion) -> int:
    """Characters that the model reads: different contexts once, and every continuation."""
    return sum(map(len, {*question.contexts})) + sum(map(len, question.continuations))
