"""Watch a server from a process apart: how long its answers take at most.

    python -m benchmarks.serve_watch PORT {health,completion} KEY

Sends a request every few milliseconds. Each line on stdin is answered with the longest wait in
seconds since the line before.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Seconds between two requests.
_PAUSES = {"health": 0.005, "completion": 0.05}
_COMPLETION = json.dumps({"model": "base", "prompt": "one", "max_tokens": 2, "ignore_eos": True})


class Waits(NamedTuple):
    """What others saw of a server: their longest waits, and the most memory that it took."""

    health_s: float = 0.0
    completion_s: float = 0.0
    peak_bytes: int = 0


def max_waits(waits: Iterable[Waits]) -> Waits:
    return Waits(*map(max, zip(*waits, strict=True)))


class Watch:
    """The longest waits for `/health` and for another key's two tokens, and the peak memory."""

    def __init__(self, pid: int, port: int, key: str):
        self._process = Path(f"/proc/{pid}")
        self._probes = []
        for kind in _PAUSES:
            command = [sys.executable, "-m", "benchmarks.serve_watch", str(port), kind, key]
            probe = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._probes.append(probe)

    def read(self) -> Waits:
        """Read what was seen since the last time."""
        health_s, completion_s = map(_ask, self._probes)
        peak_bytes = 0
        if self._process.exists():
            peak_bytes = read_bytes(self._process, "VmHWM")
            (self._process / "clear_refs").write_text("5")  # the peak begins again
        return Waits(health_s, completion_s, peak_bytes)

    def close(self) -> None:
        for probe in self._probes:
            probe.kill()
            probe.communicate()


@contextmanager
def watching(pid: int, port: int, key: str) -> Iterator[Watch]:
    watch = Watch(pid, port, key)
    try:
        watch.read()  # once both have begun
        yield watch
    finally:
        watch.close()


def read_bytes(process: Path, field: str) -> int:
    """Read a field of a process's status, such as VmRSS."""
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def _ask(probe: subprocess.Popen[str]) -> float:
    assert probe.stdin is not None
    assert probe.stdout is not None
    print(file=probe.stdin, flush=True)
    return float(probe.stdout.readline())


def _probe(port: int, kind: str, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    longest_s = 0.0
    while True:
        start = time.perf_counter()
        try:
            if kind == "health":
                connection.request("GET", "/health", headers=headers)
            else:
                connection.request("POST", "/v1/completions", _COMPLETION, headers)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):  # closed as the one silent longest
            connection.close()
        longest_s = max(longest_s, time.perf_counter() - start)
        if select.select([sys.stdin], [], [], _PAUSES[kind])[0]:
            if not sys.stdin.readline():
                return
            print(longest_s, flush=True)
            longest_s = 0.0


if __name__ == "__main__":
    _probe(int(sys.argv[1]), *sys.argv[2:])
