"""`train`: from a run file's settings to trained adapters, by one process or several.

Several are those that torchrun, accelerate or another launcher starts to train one run.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from loraloom import devices
from loraloom.config.text import local_path
from loraloom.distributed import TIMEOUT, Alone, ProcessRanks, RankLost, Ranks
from loraloom.errors import ConfigError, TrainingError, shown
from loraloom.generation.loading import load_host
from loraloom.host.host import Host
from loraloom.terminal import notebook_console
from loraloom.training.builder import Base, JobBuilder
from loraloom.training.checkpoints import Checkpoint
from loraloom.training.engine import Engine, set_up
from loraloom.training.job import JobResult
from loraloom.training.reporting import Progress
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import RunConfig, load_run_config
from loraloom.training.watched_directory import Inbox, WatchOptions, lock_watched

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

    All settings and data are checked before the first file is written. Processes that torchrun or
    accelerate started share the rows of all jobs: each calls `train`, and the first one writes the
    results.

    Args:
        run: Run file, or its settings.
        resume: Whether to resume from the newest checkpoint, if there is one.
        overwrite: Whether to replace earlier results of these jobs.
        progress: Display of the run; None shows nothing, except in notebooks.
        base: Host and tokenizer, if they are loaded already.
        between_steps: Function called between steps, which may add and stop jobs.
        watch: Directory of further job files to train, a `training.watched_directory.WatchOptions`.
        ray: Address of a Ray cluster that trains the jobs, `HOST:PORT`; `auto` is the cluster on
            this machine, or else a new one for this run.
        ray_workers: Number of Ray workers; None for one on each accelerator, or else machine.
        command: Command line that result.json records.

    Returns:
        The result of each job; a failed job has an `error`.

    Raises:
        ConfigError: If a setting is wrong, earlier results exist, another run uses the directory,
            or there is nothing to resume.
        ModelError, AdapterError, DataError: If the base model, an adapter or data cannot be loaded.
        TrainingError: If other ranks are lost.
        KeyboardInterrupt, SystemExit: After Ctrl-C or SIGTERM, when everything is saved.
    """
    if not isinstance(run, RunConfig):
        run = load_run_config(run)
    if not run.jobs and run.sweep is None and watch is None:
        raise ConfigError("a run must set jobs (at least one) or sweep")
    if run.sweep is not None and watch is not None:
        raise ConfigError("sweep and --watch exclude each other; start two runs")
    launch = read_launch()
    if progress is None or launch.rank > 0:
        progress = Progress(notebook_console() if launch.rank == 0 else None)
    if ray is not None:
        excluded = {"--watch": watch, "base": base, "between_steps": between_steps}
        names = [name for name, value in excluded.items() if value is not None]
        if launch.size > 1:
            names.append("torchrun")
        if names:
            raise ConfigError(f"--ray and {', '.join(names)} exclude each other; remove --ray")
    if watch is not None:
        watch = watch._replace(path=local_path(watch.path, "--watch"))
    device = choose_device(run, launch, is_loaded=base is not None, is_watching=watch is not None)
    directory = RunDirectory(run.output_dir, with_ray=ray is not None)
    directory.check_sources(run.all_jobs)
    with ExitStack() as stack:
        if launch.rank == 0:
            stack.enter_context(directory.opened(resume=resume, overwrite=overwrite))
        if ray is not None:
            from loraloom.training.workers import train_with_ray  # it needs Ray

            return train_with_ray(
                run,
                directory,
                ray,
                ray_workers,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
                command=command,
            )
        if watch is not None:
            stack.enter_context(lock_watched(watch.path))
        is_sharded = launch.size > 1 and run.parallel.base == "fsdp"
        ranks = stack.enter_context(joined_ranks(device, launch, in_lockstep=is_sharded))
        base = base or load_host(run, {}, device=device, sharded=is_sharded)
        stack.enter_context(_borrowed(base[0], ranks))
        engine, checkpoint = set_up(
            run, run.first_jobs, base, directory, progress, command, resume=resume
        )
        return _run_engine(run, engine, checkpoint, progress, between_steps, watch)


def _run_engine(
    run: RunConfig,
    engine: Engine,
    checkpoint: Checkpoint | None,
    progress: Progress,
    between_steps: BetweenSteps | None,
    watch: WatchOptions | None,
) -> list[JobResult]:
    if checkpoint is None and engine.host.ranks.is_first:
        engine.directory.prepare([job.name for job in run.all_jobs])
    engine.begin(checkpoint)
    callbacks: list[Callable[[Engine], None]] = []
    if between_steps is not None:
        callbacks.append(lambda engine: between_steps(engine, engine.builder))
    sweep = None
    if run.sweep is not None:
        from loraloom.training.sweep import Sweep  # it needs Optuna

        journal_bytes = 0 if checkpoint is None else checkpoint.sweep_bytes
        sweep = Sweep(run, engine, progress, journal_bytes)
        callbacks.append(sweep.between_steps)
    if watch is not None:
        callbacks.append(Inbox(watch, engine, progress.message).between_steps)
    results = engine.run(*callbacks)
    if sweep is not None:
        sweep.conclude()
    return results


class Launch(NamedTuple):
    """A process among those that were started together, and among those on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    if dist.is_initialized():
        rank = dist.get_rank()
        size = dist.get_world_size()
        local_rank = int(environment.get("LOCAL_RANK", rank))
        local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
        return Launch(rank, size, local_rank, local_size)
    required = {"RANK", "WORLD_SIZE"} & environment.keys()
    if len(required) == 1:
        raise ConfigError(
            f"RANK and WORLD_SIZE must be set together, as torchrun does, got {required.pop()} "
            "alone; start the run with torchrun, or unset both variables"
        )
    size = environment.get("WORLD_SIZE", "1")
    defaults = {"RANK": "0", "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": size}
    numbers = {name: environment.get(name, default) for name, default in defaults.items()}
    faults = [f"{name}={value}" for name, value in numbers.items() if not value.isdecimal()]
    if faults:
        raise ConfigError(
            f"{', '.join(defaults)} must be whole numbers, as torchrun sets them, got "
            f"{shown(faults[0])}; start the run with torchrun, or unset these variables"
        )
    return Launch(*map(int, numbers.values()))


def choose_device(
    run: RunConfig, launch: Launch, *, is_loaded: bool = False, is_watching: bool = False
) -> str:
    name = run.device
    if launch.size == 1:
        return name
    if run.sweep is not None or is_watching:
        raise ConfigError(
            f"{'--watch' if is_watching else 'sweep'} needs one process, got {launch.size} ranks; "
            "start it without torchrun, or spread a sweep's jobs over devices with --ray"
        )
    if run.parallel.base == "fsdp" and (is_loaded or run.quantization):
        raise ConfigError(
            "parallel.base: fsdp requires a base model in floating point that the run loads, got "
            f"{'a loaded one: `base`' if is_loaded else 'quantization'}; remove that setting, or "
            "set parallel.base: replicated"
        )
    for job in run.all_jobs:
        if not job.adapter.adds_up_over_ranks:
            raise ConfigError(
                f"job {job.name}: method {job.adapter.method} requires a single process, because "
                f"its router loss joins all tokens, got {launch.size} ranks; remove torchrun"
            )
    kind = devices.best_device().type if name == "auto" else torch.device(name).type
    kinds = devices.RANK_BACKENDS.keys()
    if kind not in kinds or (kind != "cpu" and name not in ("auto", kind)):
        raise ConfigError(
            f"device must be auto or one of {', '.join(kinds)} for several ranks, because "
            f"each rank uses a separate device, got {name if kind in kinds else kind}"
        )
    if kind == "cpu":
        return kind
    count = devices.count_devices(kind)
    if launch.local_size > count:
        raise ConfigError(
            f"each rank requires a separate {kind} device, got {launch.local_size} ranks and "
            f"{count} devices on this machine; start fewer ranks, or set device: cpu"
        )
    return f"{kind}:{launch.local_rank}"


@contextmanager
def joined_ranks(device: str, launch: Launch, *, in_lockstep: bool = False) -> Iterator[Ranks]:
    if launch.size == 1:
        yield Alone()
        return
    backend = devices.RANK_BACKENDS[torch.device(device).type]
    if device != "cpu":
        torch.accelerator.set_device_index(device)
    # A process group that is there is used, and left as it is.
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield ProcessRanks(backend, in_lockstep=in_lockstep)
    except RankLost as lost:
        raise TrainingError(str(lost)) from lost
    finally:
        if is_ours:
            dist.destroy_process_group()


@contextmanager
def _borrowed(host: Host, ranks: Ranks) -> Iterator[None]:
    """Give a host back as it was; after an error or a signal, without the run's adapters."""
    names = set(host.adapters)
    ranks_before = host.ranks
    host.ranks = ranks
    gradient_checkpointing = host.gradient_checkpointing
    try:
        yield
    except BaseException:
        for name in host.adapters.keys() - names:
            host.remove(name)
        raise
    finally:
        host.ranks = ranks_before
        host.gradient_checkpointing = gradient_checkpointing
