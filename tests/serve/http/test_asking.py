"""How often the engine's thread calls into the event loop."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

from loraloom.errors import ConfigError
from loraloom.generation.sequence import RequestError
from loraloom.serve.http.bridge import Backend, Mailbox, as_events
from tests.serve.http.test_openai import chat


class CalledLoop(asyncio.AbstractEventLoop):
    """An event loop that only takes calls."""

    def __init__(self):
        self.calls = []

    def call_soon_threadsafe(self, call):
        self.calls.append(call)


def test_what_a_step_tells_needs_one_call():
    loop, queues = CalledLoop(), [asyncio.Queue() for _ in range(3)]
    mailbox = Mailbox(loop)
    for number in range(2):
        for queue in queues:
            mailbox.put(queue, number)
        loop.calls.pop()()
        assert loop.calls == []
        assert [queue.get_nowait() for queue in queues] == [number] * 3


@pytest.mark.parametrize("num_answers", [1, 3])
def test_an_answer_that_is_not_streamed_is_told_when_it_has_ended(client, monkeypatch, num_answers):
    sent, put = [], Mailbox.put
    monkeypatch.setattr(Mailbox, "put", lambda *args: (sent.append(args), put(*args)))
    chat(client, n=num_answers)
    assert len(sent) == num_answers


def test_a_scale_that_is_none_holds_no_adapter():
    shelf = SimpleNamespace(base_name="base", take=pytest.fail)
    with pytest.raises(RequestError):
        asyncio.run(Backend.acquire(SimpleNamespace(adapters=shelf), "lora:x", None))


def test_the_base_model_has_no_scale():
    shelf = SimpleNamespace(base_name="base", take=pytest.fail)
    with pytest.raises(RequestError, match="the base model has no scale"):
        asyncio.run(Backend.acquire(SimpleNamespace(adapters=shelf), "base:0.5", None))


@pytest.mark.parametrize(("error", "level"), [(OSError, "ERROR"), (ConfigError, "INFO")])
def test_what_fails_in_a_stream_is_in_the_log(error, level, caplog):
    async def objects():
        yield {"text": "so far"}
        raise error("of the disk")

    async def events():
        return [event async for event in as_events(objects())]

    with caplog.at_level(logging.INFO, logger="loraloom"):
        assert len(asyncio.run(events())) == 3
    (record,) = caplog.records
    assert record.levelname == level
    assert isinstance(record.exc_info[1], error)
