from __future__ import annotations

import io
import time

from rich.console import Console

from loraloom.training.run.progress import (
    JobProgress,
    LiveProgress,
    PlainProgress,
    Rate,
    console_progress,
    describe_metrics,
)
from loraloom.training.run.ranking import Ranking, Standing


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


def ranking(step: int, value: float | None = None) -> Ranking:
    parameters = {"train.learning_rate": 1e-4}
    standings = (
        Standing("lr-000", parameters, steps=step, total_steps=9, value=value),
        Standing("lr-001", parameters, status="stopped", steps=4, rung_values={4: 2.5}, value=2.5),
    )
    return Ranking("eval/loss", (4,), standings, num_jobs=2)


def test_a_live_table_ranks_the_jobs_of_a_sweep_in_place_of_their_lines():
    screen = console(force_terminal=True)
    progress = LiveProgress(screen)
    progress.start()
    for name in ("lr-000", "lr-001", "law"):
        progress.add(JobProgress(name, 0, 9, 0))
    progress.rank(ranking(1, 2.25))
    shown = list(progress._bars.get_renderables())
    assert [task.visible for task in progress._bars.tasks] == [False, False, True]
    assert len(shown) == 2
    progress.stop()
    assert len(list(progress._bars.get_renderables())) == 1
    progress.conclude(ranking(9, 2.25))
    assert "2.2500" in printed(screen)


def test_plain_lines_of_a_sweep_come_when_there_is_news():
    screen = console()
    progress = PlainProgress(screen, interval_s=1000.0)
    progress.start()
    progress.add(JobProgress("lr-000", 0, 9, 0))
    for step, value in ((0, None), (1, None), (2, 2.25), (3, 2.25)):
        progress.rank(ranking(step, value))
        progress.update(JobProgress("lr-000", 9, 9, 100, 2.0))
    progress.conclude(ranking(9, 2.25))
    first, second, *table = printed(screen).splitlines()
    assert len(table) == 3
    assert first.startswith("sweep: 1 of 2 jobs train, at step 0/9; best lr-001")
    assert second.startswith("sweep: 1 of 2 jobs train, at step 2/9; best lr-000")


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
