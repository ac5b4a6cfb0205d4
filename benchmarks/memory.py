"""The memory that `loraloom train --dry-run` predicts, and what steps on this CPU take.

Each case has a process of its own, whose growth of resident memory is the second measurement. The
first follows the storages of real tensors in a forward and backward pass, as the prediction does
those of tensors without data; what is kept between steps is the same in both.

    python -m benchmarks.memory --base-model smollm2-135m --length 256
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from loraloom.generation.loading import load_host
from loraloom.host.host import Host
from loraloom.training.learner import Learner
from loraloom.training.memory import longest_batch, peak_of_round, predict_memory
from loraloom.training.settings import RunConfig, load_run_config
from loraloom.training.step.batch import MicroBatch
from loraloom.training.step.fused import add_gradients, gradients_set_aside

LORA = {"method": "lora", "rank": 16}
MIXTURE = {"method": "mixlora", "rank": 16, "num_experts": 8, "top_k": 2}
ON_BLOCKS = {**MIXTURE, "target_modules": ["attention", "moe"]}
ON_EXPERTS = {**MIXTURE, "rank": 8, "num_experts": 4, "target_modules": ["attention", "experts"]}
DORA = {**LORA, "weight_decomposition": True}
MOLA = {"method": "mola", "rank": 8, "num_experts": 4}
CHECKPOINTED = {"gradient_checkpointing": True}
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "LoRA": ([LORA], {}),
    "LoRA, checkpointed": ([LORA], CHECKPOINTED),
    "MixLoRA": ([MIXTURE], {}),
    "MixLoRA, checkpointed": ([MIXTURE], CHECKPOINTED),
    "MixLoRA, MoE": ([ON_BLOCKS], {}),
    "MixLoRA on experts, MoE": ([ON_EXPERTS], {}),
    "MixLoRA on experts, checkpointed, MoE": ([ON_EXPERTS], CHECKPOINTED),
    "4 jobs": ([LORA, MIXTURE, DORA, MOLA], {}),
    "4 jobs, MoE": ([LORA, ON_BLOCKS, ON_EXPERTS, MOLA], {}),
    "4 jobs of 2 micro-batches": ([LORA] * 4, {"micro_batch_size": 2}),
}
NUM_STEPS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Predicted and measured memory.")
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["LoRA", "MixLoRA"])
    options = parser.parse_args(arguments)
    print("| MB | predicted | measured | | process | |\n|---|---|---|---|---|---|")
    for name in options.cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures = pool.apply(measure, (options.base_model, options.length, name))
        predicted, measured, process = (figure / 1e6 for figure in figures)
        errors = [f"{predicted / figure - 1:+.1%}" for figure in (measured, process)]
        print(f"| {name} | {predicted:.0f} | {measured:.0f} | {errors[0]} ", end="")
        print(f"| {process:.0f} | {errors[1]} |", flush=True)


def measure(base_model: str, length: int, case: str) -> tuple[int, int, int]:
    """Return the predicted peak, the one by storages, and the growth of this process."""
    torch.set_num_threads(1)
    run = make_run(base_model, length, case)
    predicted = predict_memory(run)
    resident: list[int] = []
    with watching_memory(resident):
        host, _ = load_host(run, {})
        for job in run.jobs:
            host.add(job.name, job.adapter)
        host.enable_gradient_checkpointing(run.jobs[0].train.gradient_checkpointing)
        batches = [longest_batch(host, job) for job in run.jobs]
        train(host, run, batches)
    weights = [*host.model.parameters(), *host.model.buffers()]
    kept_bytes = sum([*predicted.parts.values()][1:3])
    measured = sum(weight.nbytes for weight in weights) + kept_bytes + peak_of_round(host, batches)
    return predicted.peak_bytes, measured, max(resident) - resident[0]


def make_run(base_model: str, length: int, case: str) -> RunConfig:
    """Make the run of a case in float32, with steps of four rows for each job."""
    adapters, changes = CASES[case]
    train: Mapping[str, Any] = {"batch_size": 4, "max_steps": 4, "max_length": length, **changes}
    jobs = [
        {"name": f"job{number}", "adapter": adapter, "data": {"task": "skills"}, "train": train}
        for number, adapter in enumerate(adapters)
    ]
    settings = {"base_model": base_model, "dtype": "float32", "device": "cpu"}
    return load_run_config({**settings, "output_dir": "unused", "jobs": jobs})


def train(host: Host, run: RunConfig, batches: Sequence[MicroBatch]) -> None:
    """Train some steps, and keep a copy of the weights during each, as jobs do."""
    learners = [Learner(host.adapter(job.name), job.train, host.dtype) for job in run.jobs]
    copies: list[torch.Tensor] = []
    for _ in range(NUM_STEPS):
        for _ in range(batches[0].window.num_micro_batches):
            with gradients_set_aside([batch.adapter for batch in batches]):
                add_gradients(host, batches, pad_id=0)
        copies.clear()
        for learner in learners:
            learner.clip_gradients(1.0)
            copies += [weight.detach().clone() for weight in learner.parameters.values()]
            learner.apply()
            learner.zero_grad()


@contextmanager
def watching_memory(resident: list[int]) -> Iterator[None]:
    """Note this process's resident memory every two milliseconds."""
    process = psutil.Process()
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            resident.append(process.memory_info().rss)

    resident.append(process.memory_info().rss)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


if __name__ == "__main__":
    main()
