"""Jobs of a run, set up on its base model: new ones, or from the newest checkpoint."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from loraloom.errors import ConfigError, LoraloomError
from loraloom.models.host import Host, attach
from loraloom.models.loading import load_base_model
from loraloom.training.builder import JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.parallel import check_adds_up
from loraloom.training.progress import Progress
from loraloom.training.rounds import check_limit
from loraloom.training.settings import JobConfig, RunConfig
from loraloom.training.step.optimizers import rehearse
from loraloom.training.store import Checkpoint, RunDirectory, describe_base, describe_changes

Base = tuple[Host, PreTrainedTokenizerBase]


def check_run(
    run: RunConfig, directory: RunDirectory, num_ranks: int = 1, *, resume: bool, overwrite: bool
) -> None:
    """Check what can be checked before the base model is loaded."""
    for job in run.all_jobs:
        check_adds_up(job, num_ranks)
        rehearse(job.train, job.name)
    directory.check(resume=resume, overwrite=overwrite)
    directory.check_sources(run.all_jobs)


def load_base(run: RunConfig, device: str, *, is_sharded: bool = False) -> Base:
    """Load a run's base model and attach a host to it."""
    how = (run.dtype, device, run.attn_implementation, run.quantization)
    model, tokenizer = load_base_model(run.base_model, *how, sharded=is_sharded)
    return attach(model), tokenizer


@dataclass(frozen=True)
class Setup:
    """Jobs on a host that are ready to train, and the checkpoint that they go on from."""

    run: RunConfig
    engine: Engine
    checkpoint: Checkpoint | None
    progress: Progress
    directory: RunDirectory

    def begin(self) -> None:
        """Bring the jobs to where the checkpoint has them, or write the first one."""
        if self.checkpoint is None:
            self.engine.save_state()
            return
        self.progress.message(f"going on after {self.checkpoint.round} fused steps")
        self.engine.load_state(self.checkpoint)


def set_up(
    run: RunConfig,
    configs: Sequence[JobConfig],
    base: Base,
    directory: RunDirectory,
    progress: Progress,
    command: str,
    *,
    resume: bool,
) -> Setup:
    """Build jobs of a run, those that had joined it among them, and check that they fit."""
    host, tokenizer = base
    builder = JobBuilder(host, tokenizer)
    checkpoint, lines = None, list[str]()
    if resume:
        checkpoint, lines = directory.newest_checkpoint([config.name for config in configs])
        if checkpoint is not None:
            _check_same_run(checkpoint, run, host)
        elif lines:
            raise ConfigError("\n".join([*lines, "--resume needs a whole one, there is none"]))
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
            if name not in first and record.result is None:
                try:
                    jobs.append(builder.build(JobConfig.model_validate(record.settings)))
                except (LoraloomError, ValidationError) as error:
                    lines.append(f"warning: job {name} had joined the run and is left out: {error}")
                    continue
            kept[name] = record
        checkpoint = replace(checkpoint, jobs=kept)
    engine = Engine(
        host,
        jobs,
        builder,
        directory,
        progress,
        trackers=run.trackers,
        environment=_describe_environment(host, command),
        max_tokens_per_step=run.max_tokens_per_step,
        memory_limit=run.memory_limit,
        keep_snapshots=run.keep_snapshots,
    )
    check_limit(host, run.memory_limit)
    for job in jobs:
        read = job.training_set
        lines += [f"{job.name}: {line}" for line in (*read.report, *read.warnings)]
    for line in lines:
        progress.message(line)
    return Setup(run, engine, checkpoint, progress, directory)


def _describe_environment(host: Host, command: str) -> dict[str, Any]:
    packages = ("loraloom", "torch", "transformers", "safetensors")
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "platform": platform.platform(),
        "device": str(host.device),
        "dtype": str(host.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ranks": host.ranks.size,
        "command": command,
    }


def _check_same_run(checkpoint: Checkpoint, run: RunConfig, host: Host) -> None:
    base = describe_base(host)
    changed = [f"base {name}" for name, value in base.items() if checkpoint.base.get(name) != value]
    for job in run.all_jobs:
        if job.name in checkpoint.jobs:
            saved = as_of_now(checkpoint.jobs[job.name].settings)
            # It changes no job's result.
            now = job.model_dump(mode="json") | {"priority": saved.get("priority")}
            changed += [f"job {job.name}: {change}" for change in describe_changes(saved, now)]
    if changed:
        raise ConfigError(
            "--resume needs the settings that the run began with, these differ: "
            f"{'; '.join(changed)}; set them back, or give --overwrite to begin again"
        )


def as_of_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what this version makes of a job's settings that an older one saved.

    New settings have their defaults; those of `init: eva`, which is gone, had no effect otherwise.
    """
    adapter = {name: value for name, value in settings["adapter"].items() if name != "eva"}
    try:
        return JobConfig.model_validate({**settings, "adapter": adapter}).model_dump(mode="json")
    except ValidationError:
        return settings
