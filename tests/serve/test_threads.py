"""What computes apart leaves nothing behind."""

from __future__ import annotations

import sys
import time

import psutil
import pytest
import torch

from loraloom.errors import DataError
from loraloom.serve.threads import run_apart


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other helpers")
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


def test_errors_are_told():
    def fail() -> None:
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        run_apart(fail)
