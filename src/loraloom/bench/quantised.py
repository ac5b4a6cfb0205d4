"""What a quantised base takes and costs: measured on a real one, counted for those of Llama 2."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import psutil
import torch
from torch import Tensor

from loraloom.bench.count import SHAPES, make_model, without_reads
from loraloom.bench.prediction import STEPS, JobsSetting, build_jobs
from loraloom.bench.timing import alternate, peak_rss_bytes, reset_peak_rss
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.models.quantised import quantised_linears, stored_weights
from loraloom.training.run.fitting import RoundRunner
from loraloom.training.run.memory import MemoryPrediction, predict_memory

BITS: dict[str, tuple[float, float]] = {
    "none": (16.0, 0.0),
    "nf4": (4 + 8 / 64 + 32 / (64 * 256), 0.0),
    "int8": (8.0, 32.0),
    "torchao-int8": (8.0, 40.0),
}
"""Bits of a weight with its share of its block's scales, and those of a row's own scale."""

_PROBE_LENGTH = 256


def measure_kind(base_model: str, kind: str, setting: JobsSetting) -> dict[str, float]:
    """Load a base model quantised in a process of its own, and run training and decoding steps."""
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
    linears = quantised_linears(host.model) if kind != "none" else {}
    stored = {name: tensor.nbytes for name, tensor in stored_weights(host.model)}
    layers = f"{host.base.layers_path}."
    times |= alternate({"decode": _decoding(host, jobs[0].name)}, rounds=8, warmup=2)
    return {
        "num_quantised": len(linears),
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
