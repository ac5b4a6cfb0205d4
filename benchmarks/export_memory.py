"""The memory of exporting a mixture as an MoE checkpoint, beside the base model's size (Linux).

A process of its own exports; what is measured is the most anonymous memory that it adds to what it
had with the adapter. Mapped files are left out, as the system drops their pages when it needs room.

    python -m benchmarks.export_memory --base-model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from loraloom import MixLoraConfig, attach, export, load_base_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    command = [sys.executable, "-m", "benchmarks.export_memory", *sys.argv[1:], "--measure"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(describe(json.loads(done.stdout.splitlines()[-1]), options))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Export a mixture with random weights."""
    model, tokenizer = load_base_model(options.base_model, "float32")
    host = attach(model)
    config = MixLoraConfig(rank=options.rank, num_experts=options.experts)
    adapter = fill(host.add("mix", config))
    before, seen, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as directory:
        written = export(host, tokenizer, "mix", Path(directory, "moe"), dtype=options.dtype)
    done.set()
    watcher.join()
    return {
        "memory": max(seen) - before,
        "base": sum(weight.nbytes for weight in model.parameters()),
        "adapter": sum(weight.nbytes for weight in adapter.parameters()),
        "written": written.num_bytes,
        "error": written.logit_error or 0.0,
    }


def anonymous_bytes() -> int:
    """Read what the process takes of memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def fill(adapter: torch.nn.Module) -> torch.nn.Module:
    """Give an adapter weights that change its base's outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=generator)
    return adapter


def describe(figures: dict[str, float], options: argparse.Namespace) -> str:
    sizes = {name: f"{figures[name] / 1e6:,.0f} MB" for name in figures if name != "error"}
    return (
        f"{options.base_model} with {options.experts} experts, rank {options.rank}: base model "
        f"{sizes['base']}, adapter {sizes['adapter']}, written {sizes['written']} in "
        f"{options.dtype}; memory {sizes['memory']}, {figures['memory'] / figures['base']:.2f} "
        f"times the base model; relative error of the logits {figures['error']:.1e}"
    )


if __name__ == "__main__":
    main()
