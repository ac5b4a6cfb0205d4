from __future__ import annotations

import io

from rich.console import Console

from loraloom.eval import evaluation


def show(**console):
    """Show three items, the first as long as the others together."""
    stream = io.StringIO()
    with evaluation.EvaluationProgress(Console(file=stream, width=80, **console)) as progress:
        advance = progress.start("toy", [2, 1, 1])
        for places in ([0], [1], [2]):
            advance(places)
    return stream.getvalue()


def test_progress_is_shown_now_and_then_and_disappears(monkeypatch):
    assert show() == ""  # within ten seconds
    monkeypatch.setattr(evaluation, "_PLAIN_INTERVAL_S", 0)
    shown = show()
    assert "toy: 1/3 questions |" in shown
    assert shown.endswith("\r")
    assert show(quiet=True) == ""
