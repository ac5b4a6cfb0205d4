"""`train`: from a run file's settings to trained adapters."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from loraloom.errors import ConfigError, LoraloomError
from loraloom.models.host import Host, attach
from loraloom.models.loading import load_base_model
from loraloom.ranks import Ranks
from loraloom.training.builder import JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.inbox import Inbox, WatchOptions, sole_trainer
from loraloom.training.parallel import (
    Lead,
    check_adds_up,
    joined_ranks,
    rank_device,
    read_launch,
)
from loraloom.training.progress import Progress
from loraloom.training.results import JobResult
from loraloom.training.rounds import check_limit
from loraloom.training.settings import JobConfig, RunConfig, load_run_config
from loraloom.training.step.optimizers import rehearse
from loraloom.training.store import Checkpoint, RunDirectory, describe_base, describe_changes
from loraloom.training.tracking import check_trackers

if TYPE_CHECKING:
    from loraloom.training.sweep import Sweep

Base = tuple[Host, PreTrainedTokenizerBase]
# Called between two rounds: may build jobs, and call the engine's `add` and `stop`.
BetweenSteps = Callable[[Engine, JobBuilder], None]


def train(
    run: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    base: Base | None = None,
    between_steps: BetweenSteps | None = None,
    watch: WatchOptions | None = None,
    ray: str | None = None,
    ray_workers: int | None = None,
    command: str = "",
) -> list[JobResult]:
    """Train all jobs of a run on its base model.

    Everything is read and checked before the first file is written. Where torchrun or accelerate
    started several processes, they share the rows of all jobs; each calls this, and the first one
    writes.

    Args:
        run: A run file, or its settings.
        resume: Resume from the newest checkpoint, if there is any.
        overwrite: Replace earlier results of these jobs.
        progress: Shows the run; None shows nothing.
        base: The base model and its tokenizer where they are loaded already.
        between_steps: As in `Engine.run`, with what builds further jobs.
        watch: A directory of job files to train as well.
        ray: Train the jobs on the workers of a Ray cluster: its `HOST:PORT`, or `auto` for the one
            that runs on this machine, else one for the time of the run.
        ray_workers: How many; None for one on each accelerator, or else on each machine.
        command: What result.json says the run was started with.

    Returns:
        What became of each job; a failed one has an `error`.

    Raises:
        ConfigError: If results are in the way, another run writes there, there is nothing to
            resume, or a setting is wrong.
        ModelError, AdapterError, DataError: If the base model, an adapter or data can't be had.
        TrainingError: If other ranks can't be reached any more.
        KeyboardInterrupt: After Ctrl-C, when everything is saved.
        SystemExit: After SIGTERM, likewise.
    """
    if not isinstance(run, RunConfig):
        run = load_run_config(run, needs_jobs=watch is None)
    launch = read_launch()
    progress = progress if progress is not None and launch.rank == 0 else Progress()
    options = {"resume": resume, "overwrite": overwrite}
    is_sharded = run.parallel.base == "fsdp" and launch.size > 1
    if ray is not None:
        given = {"--watch": watch, "base": base, "between_steps": between_steps}
        given["torchrun"] = launch if launch.size > 1 else None
        if others := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"--ray does not go with {', '.join(others)}; leave one of them out")
        from loraloom.training.workers import train_with_ray  # it needs Ray

        return train_with_ray(run, ray, ray_workers, progress=progress, command=command, **options)
    if is_sharded and (base or run.quantization):
        raise ConfigError(
            "parallel.base: fsdp takes a base model apart as it is loaded, in floating point, got "
            f"{'quantization' if base is None else 'one that is loaded: `base`'}; leave that out, "
            "or take base: replicated"
        )
    device = rank_device(run.device, launch)
    directory = RunDirectory(run.output_dir, is_read_only=launch.rank > 0)
    check_run(run, directory, launch.size, **options)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined_ranks(device, launch, in_lockstep=is_sharded))
        if watch is not None and ranks.is_first:
            stack.enter_context(sole_trainer(watch.path))
        host, tokenizer = base or load_base(run, device, is_sharded=is_sharded)
        stack.enter_context(_borrowed(host, ranks))
        if resume and directory.has_checkpoints():
            stack.enter_context(directory.lock())
        parts = (run, run.first_jobs, (host, tokenizer), directory, progress, command)
        setup = set_up(*parts, resume=resume)
        _check_alike(ranks, run, setup)
        sweep = None if run.sweep is None else setup.sweep()
        if setup.checkpoint is None:
            if sweep is not None:
                sweep.check_reached()
            stack.enter_context(directory.lock())
            # Another run may have ended since.
            directory.check(**options)
            directory.prepare([job.name for job in run.all_jobs])
        setup.begin()
        if sweep is not None and ranks.is_first:
            sweep.open(0 if setup.checkpoint is None else setup.checkpoint.sweep_bytes)
        actions = [one for one in (sweep, watch and _inbox(setup, watch, stack)) if one is not None]
        callbacks = [setup.lead.between_steps(one.between_steps) for one in actions]
        if between_steps is not None:
            callbacks.insert(0, lambda engine: between_steps(engine, setup.engine.builder))
        results = setup.engine.run(*callbacks)
        if sweep is not None and ranks.is_first:
            sweep.show(is_over=True)
        return results


def _inbox(setup: Setup, watch: WatchOptions, stack: ExitStack) -> Inbox:
    inbox = Inbox(watch, setup.lead, setup.progress.message)
    if setup.engine.host.ranks.is_first:
        stack.callback(inbox.close)
    return inbox


def check_run(
    run: RunConfig, directory: RunDirectory, num_ranks: int = 1, *, resume: bool, overwrite: bool
) -> None:
    """Check what can be checked before the base model is loaded."""
    for job in run.all_jobs:
        check_adds_up(job, num_ranks)
        rehearse(job.train, job.name)
    directory.check(resume=resume, overwrite=overwrite)
    directory.check_sources(run.all_jobs)
    check_trackers(run.trackers)


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

    @cached_property
    def lead(self) -> Lead:
        return Lead(self.engine)

    def sweep(self, worker: tuple[int, int] = (0, 1)) -> Sweep:
        """Make the run's sweep, whose study is not open yet."""
        from loraloom.training.sweep import Sweep  # it needs Optuna

        return Sweep(self.run, self.directory, self.progress, self.lead, worker)

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


@contextmanager
def _borrowed(host: Host, ranks: Ranks) -> Iterator[None]:
    """Let ranks share a host's rows; an error or a signal leaves the host as it was."""
    names, before, host.ranks = set(host.adapters), host.ranks, ranks
    try:
        yield
    except BaseException:
        for name in host.adapters.keys() - names:
            host.remove(name)
        raise
    finally:
        host.ranks = before


def _check_alike(ranks: Ranks, run: RunConfig, setup: Setup) -> None:
    """Check that all ranks are about to do the same."""
    jobs, checkpoint = setup.engine.jobs.values(), setup.checkpoint
    facts = {f"the data of job {job.name}": job.training_set.digest for job in jobs}
    facts["the run file"] = run.model_dump_json(exclude={"output_dir"})
    facts["the newest checkpoint"] = "" if checkpoint is None else checkpoint.directory.name
    if different := ranks.check_alike(facts):
        raise ConfigError(
            f"all {ranks.size} ranks must have the same run, these differ: {', '.join(different)}; "
            "let all machines see the same files, output_dir among them"
        )
