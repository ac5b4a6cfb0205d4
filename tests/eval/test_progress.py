from __future__ import annotations

import io
import re

from rich.console import Console

from loraloom.eval.progress import EvaluationProgress, question_size
from tests.eval.scoring import question


class Clock:
    """A clock that stands still unless it is moved."""

    now = 100.0

    def __call__(self):
        return self.now


def show(*steps, **console):
    """Show batches `(seconds, places)` of a task whose first question is as long as the others."""
    clock, stream = Clock(), io.StringIO()
    shown = EvaluationProgress(Console(file=stream, width=80, **console), 10.0, clock)
    questions = [question("x" * 6, ["a", "b"]), *[question("x", ["a", "b"])] * 2]
    with shown as progress:
        advance = progress.start("toy", [*map(question_size, questions)])
        for seconds, places in steps:
            clock.now += seconds
            advance(places)
    return stream.getvalue()


def test_a_line_comes_now_and_then():
    assert show((5, [0])) == ""
    assert show((10, [0])) == "toy: 1/3 questions, ETA -:--:--\n"
    assert show((5, [0]), (10, [1])) == "toy: 2/3 questions, ETA 0:00:10\n"
    assert show((5, [0]), (10, [1]), (5, [])) == "toy: 2/3 questions, ETA 0:00:10\n"


def test_the_last_question_has_no_line():
    assert show((60, [0, 1, 2])) == ""


def test_the_time_left_goes_by_length():
    shown = show((0, [1]), (30, [0]))
    assert shown == "toy: 2/3 questions, ETA 0:00:15\n"


def test_a_terminal_has_a_bar_that_disappears():
    shown = show((0, [1]), (30, [0]), force_terminal=True)
    assert "2/3 questions ETA 0:00:15" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert shown.endswith("\x1b[1A\x1b[2K")
