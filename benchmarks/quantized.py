"""Quantized bases: memory, time and error of each kind, and what fits on a card (Linux).

Measures each kind in a process of its own, then counts the memory of training steps at the sizes
of Llama 2 without loading anything.

    python -m benchmarks.quantized --base-model smollm2-135m
    python -m benchmarks.quantized --peaks-only
    python -m benchmarks.quantized --counted-only --shape 7b --card-gb 24
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.cases import alternate, peak_rss_bytes, reset_peak_rss
from benchmarks.count import SHAPES, make_model, without_reads
from benchmarks.memory_model import STEPS, JobsSetting, build_jobs
from benchmarks.memory_prediction import MemoryPrediction, predict_memory
from loraloom.base.loading import load_base_model
from loraloom.base.quantization import quantized_linears, stored_weights
from loraloom.host.host import Host
from loraloom.training.rounds import RoundRunner

BITS: dict[str, tuple[float, float]] = {
    "none": (16.0, 0.0),
    "nf4": (4 + 8 / 64 + 32 / (64 * 256), 0.0),
    "int8": (8.0, 32.0),
    "torchao-int8": (8.0, 40.0),
}
"""Bits of a weight with its share of its block's scales, and those of a row's own scale."""

_PROBE_LENGTH = 256

MEASURED = JobsSetting("lora", rows=4, length=256)
PEAK = JobsSetting("lora", rows=1, length=256)
CASES = {"lora": 80, "dora": 80, "mixlora": 16, "mixdora": 16}
"""The papers' adapters, of about 200 million weights at 7B, by their ranks."""
ROWS, LENGTH = 8, 512
SMALL_RANK = 8


def measure(base_model: str, kind: str, threads: int, *more: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.quantized",
        "--base-model",
        base_model,
        "--kind",
        kind,
    ]
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


def measure_kind(base_model: str, kind: str, setting: JobsSetting) -> dict[str, float]:
    """Load a base model quantized in a process of its own, and run training and decoding steps."""
    host = load_host(base_model, kind, setting)
    jobs = build_jobs(host, setting)
    runner = RoundRunner(host, pad_id=0)

    def step() -> None:
        part = jobs[0].micro_batch()
        jobs[0].accept(part, runner.run([part])[0])

    before = psutil.Process().memory_info().rss
    reset_peak_rss()
    times = alternate({"step": step}, rounds=STEPS - 1, warmup=1)
    step_bytes = peak_rss_bytes() - before
    linears = quantized_linears(host.model) if kind != "none" else {}
    stored = {name: tensor.nbytes for name, tensor in stored_weights(host.model)}
    layers = f"{host.base.layers_path}."
    times |= alternate({"decode": _decoding(host, jobs[0].name)}, rounds=8, warmup=2)
    return {
        "num_quantized": len(linears),
        "linear_mb": sum(n for name, n in stored.items() if name.startswith(layers)) / 1e6,
        "weights_mb": sum(stored.values()) / 1e6,
        "step_mb": step_bytes / 1e6,
        "step_s": times["step"],
        "decode_s": times["decode"],
        "logit_error": _logit_error(base_model, host, setting),
    }


def measure_peak(base_model: str, kind: str, setting: JobsSetting) -> dict[str, float]:
    """Run training steps in a process of its own, and measure the most that they take."""
    host = load_host(base_model, kind, setting)
    weights = sum(tensor.nbytes for _, tensor in stored_weights(host.model))
    _train(host, setting)  # what is kept for good, compiled products for example, isn't a step's
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide a part of the next steps
    before = psutil.Process().memory_info().rss
    reset_peak_rss()
    _train(host, setting)
    return {"peak_mb": (weights + peak_rss_bytes() - before) / 1e6}


def predict_at(shape: str, setting: JobsSetting) -> dict[str, MemoryPrediction]:
    """Predict the memory of a job's training steps on a Llama 2 in bfloat16, loading none."""
    host = Host(make_model(SHAPES[shape]))
    info, jobs = host.base, build_jobs(host, setting)
    plain = linear_bytes(info.shapes, "none")
    predictions = {}
    for kind in BITS:
        host.base = replace(info, quantization=None if kind == "none" else kind)
        with without_reads():
            prediction = predict_memory(host, jobs)
        saved = info.num_layers * (plain - linear_bytes(info.shapes, kind))
        base_model = prediction.base_model - round(saved)
        predictions[kind] = replace(prediction, base_model=base_model)
    return predictions


def count_fitting(prediction: MemoryPrediction, num_bytes: float) -> int:
    """Count adapters that fit in a memory and take turns in steps of the size of one's.

    Their gradients may come at once, as activations go.
    """

    def total(count: int) -> int:
        kept = count * (prediction.adapters + prediction.learning)
        activations = max(prediction.activations, count * prediction.adapters)
        return prediction.base_model + kept + activations + prediction.loss

    count = 0
    while total(count + 1) <= num_bytes:
        count += 1
    return count


def linear_bytes(shapes: dict[str, tuple[int, int]], kind: str) -> float:
    """Count the bytes of a layer's linear weights, (out_features, in_features) by name."""
    of_weight, of_row = BITS[kind]
    return sum(rows * (width * of_weight + of_row) / 8 for rows, width in shapes.values())


def load_host(base_model: str, kind: str, setting: JobsSetting) -> Host:
    """Load a base model whose weights are all in memory, none mapped from a file."""
    quantization = None if kind == "none" else kind
    model, _ = load_base_model(base_model, setting.dtype, quantization=quantization)
    for weight in model.parameters():
        if type(weight.data) is Tensor and weight.is_floating_point():  # as it was in the file
            weight.data = weight.data.clone()
    return Host(model)


def _train(host: Host, setting: JobsSetting) -> None:
    """Let a job make its steps, and take it off."""
    (job,) = build_jobs(host, setting)
    runner = RoundRunner(host, pad_id=0)
    for _ in range(STEPS):
        part = job.micro_batch()
        job.accept(part, runner.run([part])[0])
    host.remove(job.name)


def _decoding(host: Host, adapter: str) -> Any:
    """Make a function that decodes a token of four rows."""
    prompts = torch.ones(4, 32, dtype=torch.long)
    session = host.prefill(prompts, adapters=[adapter] * 4)
    return lambda: host.decode(session, prompts[:, 0])


@torch.no_grad()
def _logit_error(base_model: str, host: Host, setting: JobsSetting) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, host.config.vocab_size, (1, _PROBE_LENGTH), generator=generator)
    actual = host(ids).logits.float()
    expected = load_host(base_model, "none", setting)(ids).logits.float()
    return float((actual - expected).norm() / expected.norm())


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
