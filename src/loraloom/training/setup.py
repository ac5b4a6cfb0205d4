"""The start of a run, here or in a worker: its jobs and the checkpoint they begin from."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import torch

from loraloom.config.fields import checked
from loraloom.errors import ConfigError, plain
from loraloom.training import store
from loraloom.training.builder import Base, JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.progress import Progress
from loraloom.training.settings import JobConfig, RunConfig


def set_up(
    run: RunConfig,
    configs: Sequence[JobConfig],
    base: Base,
    directory: store.RunDirectory,
    progress: Progress,
    command: str,
    *,
    resume: bool,
) -> tuple[Engine, store.Checkpoint | None]:
    """Build a run's jobs, those that had joined it too, and give the checkpoint to begin from."""
    host, tokenizer = base
    builder, checkpoint, lines = JobBuilder(host, tokenizer), None, list[str]()
    if resume:
        checkpoint, lines = directory.newest_checkpoint([config.name for config in configs])
        if checkpoint is not None:
            store.check_same_run(checkpoint, run.all_jobs, store.describe_base(host))
        elif lines:
            raise ConfigError("\n".join([*lines, "--resume requires an undamaged checkpoint"]))
    done = set() if checkpoint is None else checkpoint.done
    jobs = [builder.build(config) for config in configs if config.name not in done]
    if checkpoint is not None:
        first, in_file = ({one.name for one in some} for some in (configs, run.all_jobs))
        kept = {}
        for name, record in checkpoint.jobs.items():
            if name not in in_file and not record.joined_later:
                lines.append(
                    f"warning: job {name} is no longer in the run file and is left out; put it "
                    "back to go on with it, before its checkpoints are replaced"
                )
                continue
            kept[name] = record
            if name not in first and record.result is None:
                settings = store.as_of_now(record.settings)
                config = checked(JobConfig, settings, origin=f"--resume: job {name}: ")
                jobs.append(builder.build(config))
        checkpoint = replace(checkpoint, jobs=kept)
    packages = ("loraloom", "torch", "transformers", "safetensors")
    environment = {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "platform": platform.platform(),
        "device": str(host.device),
        "dtype": str(host.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": host.ranks.size,
        "command": plain(command),  # manifests with half a surrogate pair can't be read
    }
    engine = Engine(host, jobs, builder, directory, progress, run, environment)
    for job in jobs:
        read = job.training_set
        lines += [f"{job.name}: {line}" for line in (*read.report, *read.warnings)]
    for line in lines:
        progress.message(line)
    return engine, checkpoint
