"""The predicted memory of training steps against the measured one (Linux).

Each setting runs three steps of jobs in a process of its own; what is measured is the high-water
mark of resident memory above what was there before the first step.

    python -m benchmarks.memory_model --base-model smollm2-135m
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass

import psutil
import torch

from benchmarks.cases import StepSetting, adapter_config, peak_rss_bytes, reset_peak_rss
from benchmarks.memory_prediction import predict_memory
from loraloom.base.loading import load_base_model
from loraloom.data.tokens import NO_LOSS, Example
from loraloom.data.training_set import Portion, TrainingSet
from loraloom.host.host import Host
from loraloom.training.job import Job
from loraloom.training.rounds import RoundRunner
from loraloom.training.settings import JobConfig

STEPS = 3


@dataclass(frozen=True)
class JobsSetting:
    """Jobs of one case that share a step, each with so many rows."""

    case: str
    rows: int
    length: int
    rank: int = 8
    jobs: int = 1
    micro_batches: int = 1
    checkpointing: bool = False
    dtype: str = "bfloat16"
    dropout: float = 0.0
    padded: bool = False

    def __str__(self) -> str:
        extra = [
            f"{self.jobs} jobs" if self.jobs > 1 else "",
            f"{self.micro_batches} micro-batches" if self.micro_batches > 1 else "",
            "checkpointing" if self.checkpointing else "",
            f"dropout {self.dropout}" if self.dropout else "",
            "padding" if self.padded else "",
            self.dtype if self.dtype != "bfloat16" else "",
        ]
        words = [f"{self.case} r {self.rank}, {self.rows} × {self.length}", *filter(None, extra)]
        return ", ".join(words)


SETTINGS = [
    JobsSetting("lora", 4, 256),
    JobsSetting("lora", 8, 256, rank=64, padded=True),
    JobsSetting("lora", 2, 512, padded=True),
    JobsSetting("dora", 4, 256, padded=True),
    JobsSetting("mixlora", 4, 256, padded=True),
    JobsSetting("mixlora", 4, 128, rank=16, jobs=4, padded=True),
    JobsSetting("mixdora", 2, 256, padded=True),
    JobsSetting("lora", 4, 128, jobs=4, micro_batches=2, padded=True),
    JobsSetting("lora", 8, 256, checkpointing=True, padded=True),
    JobsSetting("mixlora", 8, 256, checkpointing=True, padded=True),
    JobsSetting("mixlora", 4, 256, dropout=0.05, padded=True),
    JobsSetting("lora", 4, 128, dtype="float32", padded=True),
]


def predict_and_measure(base_model: str, setting: JobsSetting) -> dict[str, int]:
    """Predict the memory of steps, then run some, and measure what they take.

    What is measured is the high-water mark of resident memory above what was there before the
    first step, so a process measures one setting.
    """
    model, _ = load_base_model(base_model, dtype=setting.dtype)
    host = Host(model)
    for weight in model.parameters():
        weight.sum()  # weights that are mapped from a file are read when they are first used
    jobs = build_jobs(host, setting)
    prediction = predict_memory(host, jobs)
    before = psutil.Process().memory_info().rss
    reset_peak_rss()
    host.enable_gradient_checkpointing(setting.checkpointing)
    runner = RoundRunner(host, pad_id=0)
    for _ in range(STEPS * setting.micro_batches):
        parts = [job.micro_batch() for job in jobs]
        for job, part, loss in zip(jobs, parts, runner.run(parts), strict=True):
            job.accept(part, loss)
    predicted = prediction.total - prediction.loaded
    return {"predicted": predicted, "measured": peak_rss_bytes() - before}


def build_jobs(host: Host, setting: JobsSetting) -> list[Job]:
    """Put a setting's jobs on a host, with random tokens to learn from."""
    adapter = adapter_config(setting.case, StepSetting(rank=setting.rank))
    adapter = adapter.model_copy(update={"dropout": setting.dropout})
    train = {
        "batch_size": setting.rows * setting.micro_batches,
        "micro_batch_size": setting.rows,
        "max_steps": STEPS,
        "max_length": setting.length,
        "gradient_checkpointing": setting.checkpointing,
    }
    jobs = []
    for seed in range(setting.jobs):
        config = JobConfig.model_validate(
            {
                "name": f"job{seed}",
                "seed": seed,
                "adapter": adapter.model_dump(),
                "data": {"task": "skills"},
                "train": train,
            }
        )
        host.add(config.name, config.adapter, seed)
        jobs.append(Job(config, host.adapter(config.name), _random_set(host, setting, seed)))
    return jobs


def _random_set(host: Host, setting: JobsSetting, seed: int) -> TrainingSet:
    generator = random.Random(seed)
    count = setting.rows * setting.micro_batches * STEPS
    examples = []
    for sample_id in range(count):
        length = setting.length
        if setting.padded and sample_id % 2:
            length = 3 * length // 4
        ids = tuple(generator.randrange(3, host.config.vocab_size) for _ in range(length))
        examples.append(Example(ids, (NO_LOSS, *ids[1:]), sample_id))
    return TrainingSet(examples, [], (Portion(0, count, 1.0),), (), seed)


def measure(base_model: str, setting: JobsSetting, threads: int) -> dict[str, int]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory_model",
        "--base-model",
        base_model,
        "--threads",
        str(threads),
    ]
    command += ["--setting", json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=int, nargs="+", help="places of settings")
    parser.add_argument("--setting", help="run this one in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.setting:
        print(
            json.dumps(
                predict_and_measure(
                    arguments.base_model, JobsSetting(**json.loads(arguments.setting))
                )
            )
        )
        return
    errors = []
    print("predicted MB  measured MB   error  setting")
    chosen = SETTINGS if arguments.only is None else [SETTINGS[place] for place in arguments.only]
    for setting in chosen:
        found = measure(arguments.base_model, setting, arguments.threads)
        error = found["predicted"] / found["measured"] - 1
        errors.append(error)
        predicted, measured = round(found["predicted"] / 1e6), round(found["measured"] / 1e6)
        print(f"{predicted:12} {measured:12}  {100 * error:+5.1f} %  {setting}", flush=True)
    print(f"worst error {100 * max(errors, key=abs):+.1f} %")


if __name__ == "__main__":
    main()
