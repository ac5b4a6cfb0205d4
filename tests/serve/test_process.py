"""A server's memory doesn't grow with what it has been asked, and work apart leaves nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraloom.errors import ConfigError
from loraloom.serve.process import is_loopback, read_keys

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
