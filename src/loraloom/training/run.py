"""`train`: from a run file's settings to trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError
from loraloom.models.host import Host
from loraloom.ranks import Ranks
from loraloom.training.builder import JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.inbox import Inbox, WatchOptions, lock_watched
from loraloom.training.parallel import joined_ranks, rank_device, read_launch
from loraloom.training.progress import Progress
from loraloom.training.results import JobResult
from loraloom.training.settings import RunConfig, load_run_config
from loraloom.training.setup import Base, Setup, check_run, load_base, set_up
from loraloom.training.store import RunDirectory

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
        run = load_run_config(run)
    if not run.jobs and run.sweep is None and watch is None:
        raise ConfigError("jobs must be a list of 1 or more, or sweep must be given")
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
    if launch.size > 1 and (run.sweep is not None or watch is not None):
        raise ConfigError(
            f"{'sweep' if watch is None else '--watch'} needs one process, got {launch.size} "
            "ranks; start it without torchrun, or spread a sweep's jobs over devices with --ray"
        )
    device = rank_device(run.device, launch)
    directory = RunDirectory(run.output_dir, is_read_only=launch.rank > 0)
    check_run(run, directory, launch.size, **options)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined_ranks(device, launch, in_lockstep=is_sharded))
        if watch is not None:
            stack.enter_context(lock_watched(watch.path))
        host, tokenizer = base or load_base(run, device, is_sharded=is_sharded)
        stack.enter_context(_borrowed(host, ranks))
        if resume and directory.has_checkpoints():
            stack.enter_context(directory.lock())
        parts = (run, run.first_jobs, (host, tokenizer), directory, progress, command)
        setup = set_up(*parts, resume=resume)
        _check_alike(ranks, run, setup)
        if setup.checkpoint is None:
            stack.enter_context(directory.lock())
            # Another run may have ended since.
            directory.check(**options)
            directory.prepare([job.name for job in run.all_jobs])
        setup.begin()
        callbacks = list[Callable[[Engine], None]]()
        if between_steps is not None:
            callbacks.append(lambda engine: between_steps(engine, engine.builder))
        sweep = None
        if run.sweep is not None:
            from loraloom.training.sweep import Sweep  # it needs Optuna

            sweep = Sweep(setup, 0 if setup.checkpoint is None else setup.checkpoint.sweep_bytes)
            callbacks.append(sweep.between_steps)
        if watch is not None:
            inbox = Inbox(watch, setup.engine, progress.message)
            callbacks.append(inbox.between_steps)
        results = setup.engine.run(*callbacks)
        if sweep is not None:
            sweep.conclude()
        return results


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
