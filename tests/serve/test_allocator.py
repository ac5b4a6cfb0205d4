"""A server's memory doesn't grow with what it has been asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraloom.serve import allocator

FREED = """
import importlib.util, sys, time
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
if len(sys.argv) > 1:
    spec = importlib.util.spec_from_file_location("allocator", sys.argv[1])
    allocator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(allocator)
    assert allocator.return_freed_memory(0.05)
bytearray(30 << 20)  # from here on glibc keeps what is smaller
before = resident()
large, small = zip(*[(bytearray(300_000), bytearray(100_000)) for _ in range(200)])
del large
time.sleep(0.5)
print((resident() - before) >> 20)
"""

MULTIPLIED = """
import sys, torch
from loraloom.serve.allocator import bound_kernel_caches
if len(sys.argv) > 1:
    bound_kernel_caches()
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
weights = [torch.zeros(size, 64, dtype=torch.bfloat16) for size in (64, 96, 128)]
def multiply(rows):
    for weight in weights:
        torch.zeros(rows, 64, dtype=torch.bfloat16) @ weight.T
multiply(1)
before = resident()
for rows in range(1, 300):
    multiply(rows)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' /proc")
def test_code_of_few_shapes_is_kept():
    def grown_mib(*arguments: str) -> int:
        command = [sys.executable, "-c", MULTIPLIED, *arguments]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    unbounded = grown_mib()
    if unbounded < 50:
        pytest.skip("this processor multiplies bfloat16 without code for each shape")
    assert grown_mib("bounded") < 0.6 * unbounded
