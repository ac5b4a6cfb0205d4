from __future__ import annotations

import io

import pytest
from rich.console import Console

from loraloom.eval import progress
from loraloom.eval.progress import PlainProgress, TaskProgress, show_progress
from tests.eval.scoring import question


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def task():
    """Three questions: the first is as long as the others together."""
    return TaskProgress("toy", [question("x" * 6, ["a", "b"]), *[question("x", ["a", "b"])] * 2])


def plain(interval_s=10.0):
    stream = io.StringIO()
    return PlainProgress(Console(file=stream, width=80), interval_s), stream


def test_the_time_left_goes_by_length(clock):
    one = task()
    assert one.remaining == "-:--:--"
    clock.now += 30
    one.add([0])
    assert (one.num_done, one.remaining) == (1, "0:00:30")
    clock.now += 15
    one.add([1, 2])
    assert one.remaining == "0:00:00"


def test_a_line_comes_now_and_then(clock):
    shown, stream = plain()
    one = task()
    shown.start(one)
    clock.now += 5
    one.add([0])
    shown.update(one)
    assert stream.getvalue() == ""
    clock.now += 5
    one.add([1])
    shown.update(one)
    assert stream.getvalue() == "toy: 2/3 questions, ETA 0:00:03\n"
    clock.now += 60
    one.add([2])
    shown.update(one)
    assert stream.getvalue().count("\n") == 1


def test_a_terminal_has_a_bar_that_disappears():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with show_progress(console) as shown:
        one = task()
        shown.start(one)
        one.add([0])
        shown.update(one)
    assert "1/3 questions" in stream.getvalue()


def test_anything_else_has_lines():
    with show_progress(Console(file=io.StringIO())) as shown:
        assert isinstance(shown, PlainProgress)
