from __future__ import annotations

import io
import time

from rich.console import Console

from loraloom.train.progress import (
    JobProgress,
    LiveProgress,
    PlainProgress,
    Rate,
    console_progress,
    describe_metrics,
)


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def printed(screen: Console) -> str:
    return screen.file.getvalue()


def test_a_terminal_gets_live_lines_and_a_file_plain_ones():
    assert isinstance(console_progress(console(force_terminal=True)), LiveProgress)
    assert isinstance(console_progress(console()), PlainProgress)


def test_live_lines_show_every_job():
    screen = console(force_terminal=True)
    progress = LiveProgress(screen)
    progress.add(JobProgress("math", 0, 9, 0))
    progress.start()
    progress.add(JobProgress("law", 3, 5, 0))
    progress.update(JobProgress("math", 1, 9, 320, 1.25))
    progress.message("law: [done]")
    progress.stop()
    for text in ("math", "1/9", "loss 1.2500", "tokens/s", "ETA", "law", "3/5", "law: [done]"):
        assert text in printed(screen)


def test_plain_lines_come_every_few_seconds_and_at_the_end():
    screen = console()
    progress = PlainProgress(screen, interval_s=1000.0)
    progress.add(JobProgress("math", 0, 3, 0))
    for step in (1, 2, 3):
        progress.update(JobProgress("math", step, 3, 100 * step, 2.0, 125 * step))
    (line,) = printed(screen).splitlines()
    assert line.startswith("math: step 3/3, loss 2.0000, ")
    assert "padding 20.0 %" in line

    often = PlainProgress(console(), interval_s=0.0)
    often.add(JobProgress("math", 0, 3, 0))
    often.update(JobProgress("math", 1, 3, 100, 2.0))
    assert "step 1/3" in printed(often._console)


def test_rates_are_measured_over_the_last_steps(monkeypatch):
    clock = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    rate = Rate()
    job = JobProgress("math", 0, 10, 0)
    rate.add(job)
    assert rate.tokens_per_s is None
    assert rate.remaining(job) == "-:--:--"
    rate.add(JobProgress("math", 1, 10, 100))
    job = JobProgress("math", 3, 10, 600)
    rate.add(job)
    assert rate.tokens_per_s == 200
    assert rate.remaining(job) == "0:00:07"


def test_metrics_are_described_in_a_line():
    assert describe_metrics({"eval/loss": 1.0, "a": 0.12345}) == "eval/loss 1.0000, a 0.1235"
