"""Time cases side by side, so that a noisy machine hits them alike."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def alternate(
    cases: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Run every case in turn, `rounds` times over, and give each one's median in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, run in cases.items():
            elapsed = _timed(run)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(run: Callable[[], object]) -> float:
    _synchronise()
    start = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_machine(dtype: str) -> str:
    """Name what figures depend on: number format, processor, its instructions and threads."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    processor = next(named, platform.processor() or platform.machine())
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{dtype}, {processor} ({instructions}), {torch.get_num_threads()} threads"


def reset_peak_rss() -> None:
    """Set this process's high-water mark of resident memory back to what it uses now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Return the high-water mark of resident memory since the last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
