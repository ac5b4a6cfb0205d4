"""Size adapters, and time a server that has more of them on disk than it keeps loaded.

    python -m benchmarks.serve_adapters

Adapters are untrained: their sizes and times are those of trained ones. Each server reads every
adapter of its directory twice, one request of one token after another.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil

import loraloom
from loraloom import LoraConfig, MixLoraConfig, VeraConfig
from loraloom.adapters import AdapterConfig

SERVERS = ((8, 8), (50, 8), (50, 64), (200, 8), (200, 256))
"""Adapters on disk, and --max-adapters."""


def adapter_configs() -> dict[str, AdapterConfig]:
    configs: dict[str, AdapterConfig] = {"vera-256": VeraConfig(rank=256)}
    for rank in (4, 8, 16, 64):
        configs[f"lora-{rank}"] = LoraConfig(rank=rank)
        configs[f"dora-{rank}"] = LoraConfig(rank=rank, weight_decomposition=True)
        configs[f"mixlora-{rank}"] = MixLoraConfig(rank=rank, num_experts=8, top_k=2)
    return configs


def size_adapters(base: str, directory: Path) -> None:
    model, _ = loraloom.load_base_model(base)
    host = loraloom.attach(model)
    for name, config in adapter_configs().items():
        host.add(name, config, seed=0)
        host.save(name, directory / name)
        host.remove(name)
        weights = sum(file.stat().st_size for file in (directory / name).glob("*.safetensors"))
        times = [time_load(host, directory / name) for _ in range(5)]
        print(
            f"{name}: {weights / 1e6:.2f} MB, loads in {statistics.median(times):.3f} s", flush=True
        )


def time_load(host: loraloom.Host, path: Path) -> float:
    begun = time.perf_counter()
    host.load("loaded", path)
    seconds = time.perf_counter() - begun
    host.remove("loaded")
    return seconds


def copy_adapter(source: Path, directory: Path, count: int) -> None:
    for index in range(count):
        copy = directory / f"a{index:03}"
        copy.mkdir(parents=True)
        for file in source.iterdir():
            (copy / file.name).hardlink_to(file)


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
        passes = [[request(address, name) for name in names] for _ in range(2)]
        added = memory_mb(server.pid) - before
        first, second = (statistics.median(times) for times in passes)
        known = statistics.median(request(address, names[-1]) for _ in range(9))
        print(
            f"{len(names)} on disk, {max_adapters} kept: first {first:.3f} s, again {second:.3f} s,"
            f" loaded {known:.3f} s, {added:+.0f} MB",
            flush=True,
        )
        server.terminate()


def request(address: str, model: str) -> float:
    body: dict[str, Any] = {"model": model, "prompt": "Bus 34 in Orlen goes", "max_tokens": 1}
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        size_adapters(arguments.base_model, directory)
        for count, max_adapters in SERVERS:
            adapters = directory / f"{count}-{max_adapters}"
            copy_adapter(directory / "lora-8", adapters, count)
            time_server(arguments.base_model, adapters, max_adapters)


if __name__ == "__main__":
    main()
