"""Score five adapters and the base model in one command, and in a command each: time, memory.

    python -m benchmarks.many_adapters --data DIR [--base-model NAME] [--limit 200]

The adapters are untrained, with random B: LoRA, DoRA, MixLoRA, MixDoRA and a second MixLoRA of
rank 8. Commands take turns with their halves swapped (one command, six, six, one), so that a
machine that slows down hits both alike. Kept scores are off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cases import StepSetting, adapter_config, fill_B
from loraloom import Host, load_base_model

ADAPTERS = {
    "lora": "lora",
    "dora": "dora",
    "mixlora": "mixlora",
    "mixdora": "mixdora",
    "other-mixlora": "mixlora",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="directory of data sets")
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--limit", type=int, default=200, help="questions")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save_adapters(args.base_model, Path(directory))
        together = [["--adapter", f"{name}={directory}/{name}"] for name in ADAPTERS]
        every = [word for words in together for word in words]
        apart = [[*words, "--no-base"] for words in together] + [[]]
        first, six, again, one = (
            evaluate(args, [every]),
            evaluate(args, apart),
            evaluate(args, apart),
            evaluate(args, [every]),
        )
    seconds = {"one command": first[0] + one[0], "a command each": six[0] + again[0]}
    peaks = {"one command": max(first[1], one[1]), "a command each": max(six[1], again[1])}
    for way in seconds:
        print(f"{way}: {seconds[way] / 2:.1f} s, peak {peaks[way] / 1e9:.2f} GB")
    print(f"ratio: {seconds['one command'] / seconds['a command each']:.2f}")
    print("same accuracies:", first[2] == six[2])


def save_adapters(base_model: str, directory: Path) -> None:
    model, _ = load_base_model(base_model, dtype="float32")
    host = Host(model)
    for seed, (name, case) in enumerate(ADAPTERS.items()):
        fill_B(host.add(name, adapter_config(case, StepSetting()), seed))
        host.save(name, directory / name)


def evaluate(
    args: argparse.Namespace, commands: list[list[str]]
) -> tuple[float, int, dict[str, float]]:
    """Run commands in turn; return seconds, the highest peak in bytes, accuracies by adapter."""
    seconds, peak, accuracies = 0.0, 0, {}
    for words in commands:
        with tempfile.TemporaryDirectory() as directory:
            output = Path(directory, "result.json")
            fixed = ["--task", args.task, "--scoring", "text", "--limit", str(args.limit)]
            where = ["--base-model", args.base_model, "--data", args.data, "--output", str(output)]
            program = str(Path(sys.executable).with_name("loraloom"))
            start = time.perf_counter()
            process = subprocess.Popen([program, "eval", *fixed, *where, "--no-cache", *words])
            _, status, usage = os.wait4(process.pid, 0)
            seconds += time.perf_counter() - start
            peak = max(peak, usage.ru_maxrss * 1024)
            if status:
                raise SystemExit(
                    f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}"
                )
            results = json.loads(output.read_text())["results"]
        accuracies |= {name: tasks[args.task]["accuracy"] for name, tasks in results.items()}
    return seconds, peak, accuracies


if __name__ == "__main__":
    main()
