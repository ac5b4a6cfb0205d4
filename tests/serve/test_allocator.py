"""Memory that a server has freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraloom.serve import allocator

FREED = """
import importlib.util, sys
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
if len(sys.argv) > 1:
    spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
    allocator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(allocator)
    assert allocator.return_freed_memory()
bytearray(30 << 20)  # from here on glibc would keep what is smaller
before = resident()
large, small = zip(*[(bytearray(300_000), bytearray(100_000)) for _ in range(200)])
del large
print((resident() - before) >> 20)
"""


def kept_mib(*arguments: str) -> int:
    """What stays of 60 MB that are freed and 20 MB that are not."""
    command = [sys.executable, "-S", "-c", FREED, *arguments]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' /proc")
def test_large_allocations_go_back_between_small_ones():
    if allocator.platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    assert kept_mib() > 60  # otherwise there is no need for it
    assert kept_mib(allocator.__file__) < 25
