"""Clients that hold connections without asking anything."""

import socket
import time
from contextlib import suppress

import httpx2
import pytest

from loraloom.serve.http import server
from tests.serve.http.in_process import serving
from tests.serve.http.test_safety import wait_until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(server, "SECONDS", dict.fromkeys(server.SECONDS, 0.3))
    monkeypatch.setattr(server, "IDLE_S", 0.3)


def connect(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60)


def closed_by_server(connection, dribble=b""):
    """Wait until the server closes a connection, on which something is sent again and again."""
    connection.settimeout(0.02)
    end = time.monotonic() + 60
    try:
        while time.monotonic() < end:
            with suppress(TimeoutError):
                if connection.recv(65536) == b"":
                    return True
            connection.sendall(dribble)
    except OSError:
        return True
    return False


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("start", "dribble"),
    [
        (b"", b""),
        (HEAD, b"X-A: b\r\n"),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", b"a"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    ],
    ids=["nothing", "headers by drops", "a body by drops", "nothing more"],
)
def test_slow_clients_are_let_go(host, tokenizer, start, dribble):
    with serving(host, tokenizer) as (url, _), connect(url) as connection:
        connection.sendall(start)
        assert closed_by_server(connection, dribble)


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(host, tokenizer):
    both = HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    smuggled = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(host, tokenizer) as (url, _), connect(url) as connection:
        connection.sendall(both + smuggled)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answers.startswith(b"HTTP/1.1 400 ")
        assert answers.count(b"HTTP/1.1 ") == 1


@pytest.mark.usefixtures("hurried")
def test_clients_that_do_not_read_are_let_go(host, tokenizer):
    with serving(host, tokenizer) as (url, _), connect(url) as connection:
        # more than the system buffers
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        expected = 'loraloom_closed_connections_total{reason="read"} 1.0'
        wait_until(lambda: expected in httpx2.get(f"{url}/metrics").text)


def test_the_connection_that_waits_longest_goes_for_a_new_one(host, tokenizer, monkeypatch):
    monkeypatch.setattr(server, "max_connections", lambda: 4)
    with serving(host, tokenizer) as (url, _):
        held = [connect(url) for _ in range(12)]
        assert httpx2.get(f"{url}/health").text == "ok"
        for connection in held[:8]:
            assert closed_by_server(connection)
        held[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in held[-1].recv(1000)
        for connection in held:
            connection.close()
