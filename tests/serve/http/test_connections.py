"""Clients that hold connections without asking anything."""

from __future__ import annotations

import socket
import threading
import time

import httpx2
import pytest

from loraloom.errors import ConfigError
from loraloom.serve.http import server
from loraloom.serve.http.server import ConnectionLimits
from tests.serve.http.in_process import serving
from tests.serve.http.test_safety import CHAT, error_of, wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
SHORT = {"header_s": 0.3, "body_s": 0.3, "idle_s": 0.3}


def connect(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)


def closed_by_server(connection, dribble=b""):
    """Wait until the server closes a connection, on which something is sent again and again."""
    connection.settimeout(0.02)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if connection.recv(65536) == b"":
                return True
        except TimeoutError:
            pass
        except ConnectionError:
            return True
        try:
            connection.sendall(dribble)
        except OSError:
            return True
    return False


@pytest.mark.parametrize(
    ("start", "dribble", "reason"),
    [
        (b"", b"", "header"),
        (HEAD, b"X-A: b\r\n", "header"),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", b"a", "body"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"", "idle"),
    ],
    ids=["nothing", "headers by drops", "a body by drops", "nothing more"],
)
def test_slow_clients_are_let_go(host, tokenizer, start, dribble, reason):
    with serving(host, tokenizer, connections=ConnectionLimits(**SHORT)) as (url, _):
        with connect(url) as connection:
            connection.sendall(start)
            assert closed_by_server(connection, dribble)
        expected = f'loraloom_closed_connections_total{{reason="{reason}"}} 1.0'
        assert expected in httpx2.get(f"{url}/metrics").text


def test_clients_that_do_not_read_are_let_go(host, tokenizer):
    limits = ConnectionLimits(**SHORT)
    with serving(host, tokenizer, connections=limits) as (url, _), connect(url) as connection:
        # more than the system buffers
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        expected = 'loraloom_closed_connections_total{reason="read"} 1.0'
        wait_until(lambda: expected in httpx2.get(f"{url}/metrics").text)


def test_the_connection_that_waits_longest_goes_for_a_new_one(host, tokenizer, caplog):
    with serving(host, tokenizer, connections=ConnectionLimits(max_connections=4)) as (url, _):
        held = [connect(url) for _ in range(12)]
        assert httpx2.get(f"{url}/health").text == "ok"
        for connection in held[:8]:
            assert closed_by_server(connection)
        held[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in held[-1].recv(1000)
        for connection in held:
            connection.close()
    assert "closed a connection (crowded)" in caplog.messages


def test_health_is_told_when_every_connection_is_in_use(host, tokenizer):
    body = CHAT | {"max_tokens": 200, "ignore_eos": True}
    with serving(host, tokenizer, connections=ConnectionLimits(max_connections=1)) as (url, engine):
        path, answers = f"{url}/v1/chat/completions", []
        thread = threading.Thread(target=lambda: answers.append(httpx2.post(path, json=body)))
        thread.start()
        wait_until(lambda: engine.num_running > 0)
        refused = httpx2.post(path, json=CHAT)
        assert error_of(refused, 503)["code"] == "crowded"
        assert httpx2.get(f"{url}/health").text == "ok"
        thread.join()
    assert answers[0].status_code == 200


def test_connections_fit_the_limit_of_open_files(monkeypatch):
    monkeypatch.setattr(server, "_max_open_files", lambda: 1024)
    assert ConnectionLimits().max_connections == 736
    with pytest.raises(ConfigError, match="--max-connections must be at most 736"):
        ConnectionLimits(max_connections=800)
