"""Nothing of a request stays in memory once it is answered, without a garbage collection."""

import gc
import json
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from loraloom.serve.http.exchange import Exchange
from tests.serve.http.in_process import serving

JSON = {"Content-Type": "application/json"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}
REQUESTS: dict[str, dict[str, Any]] = {
    "an answer": {},
    "a stream": {"stream": True},
    "tools": {"tools": [{"type": "function", "function": {"name": "paint"}}]},
    "an unknown model": {"model": "nobody"},
    "a long prompt": {"messages": [{"role": "user", "content": "one " * 2000}]},
    "a bad template": {"messages": [{"role": "user", "content": "\ud800"}]},
    "a bad schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": {"type": 3}},
        }
    },
}


@pytest.fixture(scope="module")
def url(host, tokenizer):
    with serving(host, tokenizer) as (address, _):
        yield f"{address}/v1/chat/completions"


@contextmanager
def uncollected() -> Iterator[list[weakref.ref[object]]]:
    """Expect that what references name is gone, though no garbage is collected."""
    references: list[weakref.ref[object]] = []
    gc.collect()
    gc.disable()
    try:
        yield references
        end = time.monotonic() + 5
        while any(reference() is not None for reference in references) and time.monotonic() < end:
            time.sleep(0.01)
        assert references
        assert [reference() for reference in references if reference() is not None] == []
    finally:
        gc.enable()


def post(url, fields):
    content = json.dumps({"model": "lora", **CHAT, **fields})
    return httpx2.post(url, content=content, headers=JSON, timeout=30)


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answered_request_leaves_memory_at_once(url, name, monkeypatch):
    init = Exchange.__init__

    def note(exchange, backend, body, http):
        references.extend([weakref.ref(body), weakref.ref(exchange)])
        init(exchange, backend, body, http)

    monkeypatch.setattr(Exchange, "__init__", note)
    with uncollected() as references:
        post(url, REQUESTS[name])
