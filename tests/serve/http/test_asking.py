"""How often the engine's thread calls into the event loop."""

from __future__ import annotations

import asyncio

import pytest

from loraloom.serve.http.asking import Waker
from tests.serve.http.test_openai import chat


class CalledLoop(asyncio.AbstractEventLoop):
    """An event loop that only takes calls."""

    def __init__(self):
        self.calls = []

    def call_soon_threadsafe(self, call):
        self.calls.append(call)


def test_signals_of_a_step_need_one_call():
    loop, signals = CalledLoop(), [asyncio.Event() for _ in range(3)]
    waker = Waker(loop)
    for _ in range(2):
        for signal in signals:
            signal.clear()
            waker.wake(signal)
        loop.calls.pop()()
        assert loop.calls == []
        assert all(signal.is_set() for signal in signals)


@pytest.mark.parametrize("num_answers", [1, 3])
def test_an_answer_that_is_not_streamed_is_told_when_it_has_ended(client, monkeypatch, num_answers):
    woken, wake = [], Waker.wake
    monkeypatch.setattr(Waker, "wake", lambda *args: (woken.append(args), wake(*args)))
    chat(client, n=num_answers)
    assert len(woken) == num_answers
