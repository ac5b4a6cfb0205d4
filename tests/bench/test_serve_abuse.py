"""A server's process: no key takes another's share, and signals are heeded."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2
import pytest

from benchmarks import serve_abuse

SHARES = (
    "history",
    "full_queue",
    "large_prompts",
    "many_messages",
    "long_prompts",
    "scored_prompts",
    "routed_prompts",
    "text_that_does_not_settle",
)


@pytest.fixture(scope="module")
def server():
    with serve_abuse.served(scale=0.05) as server:
        yield server


@pytest.mark.parametrize("name", SHARES)
def test_the_server_holds_against(server, name):
    (result,) = serve_abuse.attack(server, [name])
    assert result.held, result.outcome


def test_sighup_changes_the_keys_and_a_second_signal_ends_a_busy_server_at_once(server):
    url = f"http://127.0.0.1:{server.port}"

    def status(key):
        headers = {"Authorization": f"Bearer {key}"}
        return httpx2.get(f"{url}/v1/models", headers=headers, timeout=60).status_code

    assert [status("user-2"), status("new")] == [200, 401]
    (server.directory / "keys").write_text("new")
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 60
    while status("new") != 200 and time.monotonic() < end:
        time.sleep(0.02)
    assert [status("user-2"), status("new")] == [401, 200]
    body = {"model": "base", "prompt": ["one"] * 150, "max_tokens": 50, "ignore_eos": True}
    settings = {"headers": {"Authorization": "Bearer new"}, "timeout": 60}
    ask = partial(httpx2.post, f"{url}/v1/completions", json=body, **settings)
    answer = ThreadPoolExecutor().submit(ask)
    while "loraloom_requests_running 0.0" in httpx2.get(f"{url}/metrics", **settings).text:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=10) == 130
    assert isinstance(answer.exception(), httpx2.HTTPError)
    assert "terminate called" not in server.log.read_text()
