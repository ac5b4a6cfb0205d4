"""The predicted memory of training steps, and the measured one (Linux)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import psutil

from loraloom.bench.cases import StepSetting, adapter_config
from loraloom.bench.timing import peak_rss_bytes, reset_peak_rss
from loraloom.config.job import JobConfig
from loraloom.data.examples import NO_LOSS, Example
from loraloom.data.training_set import Portion, TrainingSet
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.training.run.fitting import RoundRunner
from loraloom.training.run.job import Job
from loraloom.training.run.memory import predict_memory

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
