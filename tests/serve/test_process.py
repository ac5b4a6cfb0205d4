"""A server's memory doesn't grow with what it has been asked, and work apart leaves nothing."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest
import torch

from loraloom.errors import ConfigError
from loraloom.serve.process import is_loopback, read_keys, run_apart

RESIDENT = """
import sys, time
from loraloom.serve.process import bound_memory
if len(sys.argv) > 1:
    assert bound_memory(0.05)
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
"""
FREED = """
bytearray(30 << 20)  # from here on glibc keeps what is smaller
before = resident()
large, small = zip(*[(bytearray(300_000), bytearray(100_000)) for _ in range(200)])
del large
time.sleep(0.5)
print((resident() - before) >> 20)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")


def grown_mib(program: str, *arguments: str) -> int:
    command = [sys.executable, "-c", RESIDENT + program, *arguments]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@linux
def test_large_allocations_go_back_between_small_ones():
    """Of 60 MB that are freed and 20 MB that are not, the latter stay."""
    assert grown_mib(FREED) > 60  # otherwise there is no need for it
    assert grown_mib(FREED, "bounded") < 25


@linux
def test_helpers_end_with_the_work():
    process = psutil.Process()

    def compute() -> int:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(3)
        torch.ones(1 << 20).add(1)
        torch.set_num_threads(num_threads)
        return process.num_threads()

    run_apart(compute)  # PyTorch's other threads come with the first use
    before = settled(process)
    assert run_apart(compute) >= before + 3  # its own thread and two helpers
    assert settled(process) == before


def settled(process: psutil.Process) -> int:
    """Count a process's threads when those that end have ended."""
    number, same_since = process.num_threads(), time.monotonic()
    while time.monotonic() < same_since + 0.05:
        if process.num_threads() != number:
            number, same_since = process.num_threads(), time.monotonic()
        time.sleep(0.001)
    return number


def test_loopback_is_known():
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1", "127.1.2.3")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.org", "10.0.0.1")))


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeff# ours\n\nfirst\n second \n", encoding="utf-8")  # some editors begin so
    assert read_keys(path) == ["first", "second"]
    path.write_text("# none\n")
    with pytest.raises(ConfigError, match="must have an API key a line"):
        read_keys(path)
    with pytest.raises(ConfigError, match="can't be read"):
        read_keys(tmp_path / "missing")
