"""Quantised bases: memory, time and error of each kind, and what fits on a card (Linux).

Measures each kind in a process of its own, then counts the memory of training steps at the sizes
of Llama 2 without loading anything.

    .venv/bin/python benchmarks/quantised.py --base-model smollm2-135m
    .venv/bin/python benchmarks/quantised.py --peaks-only
    .venv/bin/python benchmarks/quantised.py --counted-only --shape 7b --card-gb 24
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import torch

from loraloom.bench.prediction import JobsSetting
from loraloom.bench.quantised import BITS, count_fitting, measure_kind, measure_peak, predict_at

MEASURED = JobsSetting("lora", rows=4, length=256)
PEAK = JobsSetting("lora", rows=1, length=256)
CASES = {"lora": 80, "dora": 80, "mixlora": 16, "mixdora": 16}
"""The papers' adapters, of about 200 million weights at 7B, by their ranks."""
ROWS, LENGTH = 8, 512
SMALL_RANK = 8


def measure(base_model: str, kind: str, threads: int, *more: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--base-model", base_model, "--kind", kind]
    command += ["--threads", str(threads), *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_measured(base_model: str, threads: int) -> None:
    plain: dict[str, float] = {}
    print(
        "| kind | linear layers MB | ÷ bf16 | all weights MB | step peak MB | step ÷ | decode ÷ "
        "| logits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in BITS:
        found = measure(base_model, kind, threads)
        plain = plain or found
        cells = [
            f"{found['linear_mb']:.1f}",
            f"{found['linear_mb'] / plain['linear_mb']:.3f}",
            f"{found['weights_mb']:.1f}",
            f"{found['step_mb']:.0f}",
            f"{found['step_s'] / plain['step_s']:.2f}",
            f"{found['decode_s'] / plain['decode_s']:.2f}",
            f"{100 * found['logit_error']:.1f} %",
        ]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def print_peaks(base_model: str, threads: int) -> None:
    """Print the peak of training steps, the weights included, of each kind of base and method."""
    print(f"\n| peak of a step MB (÷ bf16) | {' | '.join(CASES)} |")
    print("|---|---|---|---|---|")
    plain: dict[str, float] = {}
    for kind in BITS:
        cells = []
        for case in CASES:
            peak = measure(base_model, kind, threads, "--peak-of", case)["peak_mb"]
            cells.append(f"{peak:.0f} ({peak / plain.setdefault(case, peak):.2f})")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)


def print_counted(shape: str, card_gb: float) -> None:
    print(f"\n{shape}, {ROWS} × {LENGTH} tokens a step, bfloat16, gradient checkpointing")
    print(f"| adapter | base | base GB | step GB | total GB | adapters in {card_gb:g} GB |")
    print("|---|---|---|---|---|---|")
    for case, rank in (*CASES.items(), ("lora", SMALL_RANK), ("mixlora", SMALL_RANK)):
        setting = JobsSetting(case, ROWS, LENGTH, rank, checkpointing=True)
        for kind, one in predict_at(shape, setting).items():
            cells = [
                f"{one.base_model / 1e9:.2f}",
                f"{(one.total - one.base_model) / 1e9:.2f}",
                f"{one.total / 1e9:.2f}",
                str(count_fitting(one, card_gb * 1e9)),
            ]
            print(f"| {case} r {rank} | {kind} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", default="7b", help="7b, 13b or 70b")
    parser.add_argument("--card-gb", type=float, default=24.0)
    parser.add_argument("--counted-only", action="store_true")
    parser.add_argument("--kind", help="measure this one in this process")
    parser.add_argument("--peak-of", choices=CASES, help="of --kind, the peak of a step alone")
    parser.add_argument("--peaks-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.kind and arguments.peak_of:
        setting = replace(PEAK, case=arguments.peak_of)
        print(json.dumps(measure_peak(arguments.base_model, arguments.kind, setting)))
        return
    if arguments.kind:
        print(json.dumps(measure_kind(arguments.base_model, arguments.kind, MEASURED)))
        return
    if arguments.peaks_only:
        print_peaks(arguments.base_model, arguments.threads)
        return
    if not arguments.counted_only:
        print_measured(arguments.base_model, arguments.threads)
        print_peaks(arguments.base_model, arguments.threads)
    print_counted(arguments.shape, arguments.card_gb)


if __name__ == "__main__":
    main()
