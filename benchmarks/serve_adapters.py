"""Size adapters, and time the first token of servers with 8, 50 and 200 of them.

    python -m benchmarks.serve_adapters
    python -m benchmarks.serve_adapters --sizes lora-8

Adapters are untrained: their sizes and times are those of trained ones. A server with N places
loads N adapters, and answers the last 40 again: one request of one token after another, and after
each of these one of the base model. Their files leave the system's cache before each request, so
that a load reads the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

import loraloom
from loraloom import LoraConfig, MixLoraConfig, VeraConfig
from loraloom.adapters import AdapterConfig

SERVERS = ((8, 8), (50, 50), (200, 200), (200, 8))
"""Adapters on disk, and --max-adapters."""
NUM_TIMED = 40


def adapter_configs() -> dict[str, AdapterConfig]:
    configs: dict[str, AdapterConfig] = {"vera-256": VeraConfig(rank=256)}
    for rank in (4, 8, 16, 64):
        configs[f"lora-{rank}"] = LoraConfig(rank=rank)
        configs[f"dora-{rank}"] = LoraConfig(rank=rank, weight_decomposition=True)
        configs[f"mixlora-{rank}"] = MixLoraConfig(rank=rank, num_experts=8, top_k=2)
    return configs


def size_adapters(base: str, directory: Path, names: Sequence[str]) -> None:
    model, _ = loraloom.load_base_model(base)
    host = loraloom.attach(model)
    configs = adapter_configs()
    for name, config in ((name, configs[name]) for name in names or configs):
        host.add(name, config, seed=0)
        host.save(name, directory / name)
        host.remove(name)
        weights = sum(file.stat().st_size for file in (directory / name).glob("*.safetensors"))
        disk, cached = (
            statistics.median(time_load(host, directory / name, forget=forget) for _ in range(5))
            for forget in (True, False)
        )
        print(
            f"{name}: {weights / 1e6:.2f} MB, loads in {disk:.3f} s, cached {cached:.3f} s",
            flush=True,
        )


def time_load(host: loraloom.Host, path: Path, *, forget: bool) -> float:
    if forget:
        forget_files(path)
    begun = time.perf_counter()
    host.load("loaded", path)
    seconds = time.perf_counter() - begun
    host.remove("loaded")
    return seconds


def forget_files(directory: Path) -> None:
    """Drop files from the system's cache, which keeps what is not yet on the disk."""
    for file in directory.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_adapter(source: Path, directory: Path, count: int) -> None:
    for index in range(count):
        shutil.copytree(source, directory / f"a{index:03}")


def time_server(base: str, directory: Path, max_adapters: int) -> None:
    command = [sys.executable, "-m", "loraloom", "serve", "--base-model", base, "--port", "0"]
    command += ["--adapter-dir", str(directory), "--max-adapters", str(max_adapters)]
    command += ["--cache-tokens", "8192"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        listening = next(line for line in server.stdout if line.startswith("listening on "))
        address = listening.split()[-1]
        request(address, base)
        before = memory_mb(server.pid)
        names = sorted(path.name for path in directory.iterdir())
        for name in names[-max_adapters:-NUM_TIMED]:
            request(address, name)
        timed = names[-NUM_TIMED:]
        passes = [time_pass(address, base, directory, timed) for _ in range(2)]
        added = memory_mb(server.pid) - before
        described = ", ".join(f"{first:.3f} s ({ratio:.2f} ×)" for first, ratio in passes)
        print(
            f"{len(names)} on disk, {max_adapters} kept: {described}, {added:+.0f} MB", flush=True
        )
        server.terminate()


def time_pass(
    address: str, base: str, directory: Path, names: Sequence[str]
) -> tuple[float, float]:
    """Time a request of each adapter, and relative to one of the base model after it; medians."""
    times, ratios = [], []
    for name in names:
        forget_files(directory / name)
        times.append(request(address, name))
        ratios.append(times[-1] / request(address, base))
    return statistics.median(times), statistics.median(ratios)


def request(address: str, model: str) -> float:
    prompt = f"{secrets.token_hex(4)} goes to the"  # no prompt is known already
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
    begun = time.perf_counter()
    with urllib.request.urlopen(post) as answer:
        answer.read()
    return time.perf_counter() - begun


def memory_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--sizes", nargs="*", default=[], help="of these alone; lora-8 is served")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        size_adapters(arguments.base_model, directory, arguments.sizes)
        for count, max_adapters in SERVERS:
            adapters = directory / f"{count}-{max_adapters}"
            copy_adapter(directory / "lora-8", adapters, count)
            time_server(arguments.base_model, adapters, max_adapters)


if __name__ == "__main__":
    main()
