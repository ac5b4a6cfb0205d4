from __future__ import annotations

import io
import re

from rich.console import Console

from loraloom.eval import evaluation


def show(*batches, interval=0.0, monkeypatch, **console):
    """Show batches of three items, the first as long as the others together."""
    monkeypatch.setattr(evaluation, "PLAIN_INTERVAL_S", interval)
    stream = io.StringIO()
    with evaluation.EvaluationProgress(Console(file=stream, width=80, **console)) as progress:
        advance = progress.start("toy", [2, 1, 1])
        for places in batches:
            advance(places)
    return stream.getvalue()


def test_a_line_comes_now_and_then_but_not_for_the_last_item(monkeypatch):
    shown = show([0], [1], [2], monkeypatch=monkeypatch)
    assert re.fullmatch(
        r"toy: 1/3 questions, ETA -:--:--\ntoy: 2/3 questions, ETA 0:00:0\d\n", shown
    )
    assert show([0], [1], interval=10.0, monkeypatch=monkeypatch) == ""


def test_a_terminal_has_a_bar_that_disappears(monkeypatch):
    shown = show([1], [0], monkeypatch=monkeypatch, force_terminal=True)
    assert "toy: 2/3 questions" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert shown.endswith("\x1b[1A\x1b[2K")
