"""`train`: from a run file's settings to trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from loraloom.errors import ConfigError, LoraloomError
from loraloom.models.host import Host, attach
from loraloom.models.loading import load_base_model
from loraloom.ranks import Ranks
from loraloom.training.builder import JobBuilder
from loraloom.training.checkpoint import Snapshot
from loraloom.training.checks import check_adds_up, check_same_run, check_sources
from loraloom.training.engine import Engine, describe_base
from loraloom.training.evaluation import Evaluation
from loraloom.training.inbox import Inbox, WatchOptions, sole_trainer
from loraloom.training.job import Job
from loraloom.training.launch import Launch, joined_ranks, rank_device, read_launch
from loraloom.training.lead import Lead
from loraloom.training.memory import check_limit
from loraloom.training.outputs import RunDirectory
from loraloom.training.progress import Progress
from loraloom.training.results import JobResult, describe_environment
from loraloom.training.settings import JobConfig, RunConfig, load_run_config
from loraloom.training.step.optimizers import rehearse
from loraloom.training.tracking import check_trackers

if TYPE_CHECKING:
    from loraloom.training.sweep import Sweep

BetweenSteps = Callable[[Engine, JobBuilder], None]
"""Called between two rounds: may build jobs, and call the engine's `add` and `stop`."""


def train(
    run: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    base: tuple[Host, PreTrainedTokenizerBase] | None = None,
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
        resume: Go on from the newest snapshot, if there is any.
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
    _check_goes_with(launch, run, base)
    if ray is not None:
        _check_goes_with_ray(launch, watch, base, between_steps)
        from loraloom.training.workers import train_with_ray  # it needs Ray

        return train_with_ray(
            run,
            ray,
            ray_workers,
            resume=resume,
            overwrite=overwrite,
            progress=progress or Progress(),
            command=command,
        )
    device = rank_device(run.device, launch)
    progress = progress if progress is not None and launch.rank == 0 else Progress()
    directory = RunDirectory(run.output_dir, is_read_only=launch.rank > 0)
    check_run(run, directory, resume=resume, overwrite=overwrite)
    with ExitStack() as stack:
        is_sharded = run.parallel.base == "fsdp" and launch.size > 1
        ranks = stack.enter_context(joined_ranks(device, launch, in_lockstep=is_sharded))
        if watch is not None and ranks.is_first:
            stack.enter_context(sole_trainer(watch.path))
        host, tokenizer = base or load_base(run, device, is_sharded=is_sharded)
        stack.enter_context(_taken_off_at_an_error(host))
        stack.enter_context(_shared_by(ranks, host))
        if resume and directory.snapshots.exists():
            stack.enter_context(directory.lock())
        setup = set_up(
            run, run.first_jobs, (host, tokenizer), directory, progress, command, resume=resume
        )
        _check_alike(ranks, run, setup)
        sweep = None if run.sweep is None else setup.sweep()
        if setup.snapshot is None:
            if sweep is not None:
                sweep.check_reached()
            stack.enter_context(directory.lock())
            directory.check(resume=resume, overwrite=overwrite)  # another run may have ended now
            directory.prepare([job.name for job in run.all_jobs])
        setup.begin()
        callbacks: list[Callable[[Engine], None]] = []
        if sweep is not None:
            if ranks.is_first:
                sweep.study.open(0 if setup.snapshot is None else setup.snapshot.sweep_bytes)
            callbacks.append(setup.lead.between_steps(sweep.between_steps))
        if between_steps is not None:
            callbacks.append(lambda engine: between_steps(engine, setup.builder))
        if watch is not None:  # the last one, as it may wait
            inbox = Inbox(watch, setup.lead, progress.message)
            if ranks.is_first:
                stack.enter_context(inbox)
            callbacks.append(setup.lead.between_steps(inbox.between_steps))
        results = setup.engine.run(*callbacks)
        if sweep is not None and ranks.is_first:
            sweep.study.show(is_over=True)
        return results


def check_run(run: RunConfig, directory: RunDirectory, *, resume: bool, overwrite: bool) -> None:
    """Check what can be checked before the base model is loaded."""
    directory.check(resume=resume, overwrite=overwrite)
    check_sources(run.all_jobs, directory)
    check_trackers(run.trackers)
    for job in run.all_jobs:
        rehearse(job.train, job.name)


@dataclass(frozen=True)
class Setup:
    """Jobs on a host that are ready to train, and the snapshot that they go on from."""

    run: RunConfig
    engine: Engine
    builder: JobBuilder
    snapshot: Snapshot | None
    progress: Progress
    directory: RunDirectory

    @cached_property
    def lead(self) -> Lead:
        """The engine as the first rank's decisions see it."""
        return Lead(self.engine, self.builder)

    def sweep(self, worker: tuple[int, int] = (0, 1)) -> Sweep:
        """Make the run's sweep, whose study is not open yet."""
        from loraloom.training.sweep import Sweep, SweepStudy  # it needs Optuna

        study = SweepStudy(self.run, self.directory, self.progress)
        jobs = list(self.engine.jobs.values())
        return Sweep(study, self.run, self.lead, self.progress, jobs, worker)

    def begin(self) -> None:
        """Bring the jobs to where the snapshot has them, or write the first one."""
        if self.snapshot is None:
            self.engine.save_state()
            return
        self.progress.message(f"going on after {self.snapshot.round} fused steps")
        self.engine.load_state(self.snapshot)


def set_up(
    run: RunConfig,
    configs: Sequence[JobConfig],
    base: tuple[Host, PreTrainedTokenizerBase],
    directory: RunDirectory,
    progress: Progress,
    command: str,
    *,
    resume: bool,
) -> Setup:
    """Build jobs of a run, those that had joined it among them, and check that they fit."""
    host, tokenizer = base
    evaluation = Evaluation(host, tokenizer)
    builder = JobBuilder(host, tokenizer, evaluation)
    names = [config.name for config in configs]
    snapshot, lines = _read_snapshot(directory, names, run, host) if resume else (None, [])
    jobs, snapshot, left_out = _build_jobs(builder, run, configs, snapshot)
    engine = Engine(
        host,
        jobs,
        evaluation,
        directory,
        progress,
        trackers=run.trackers,
        environment=describe_environment(host.device, host.dtype, command, host.ranks.size),
        max_tokens_per_step=run.max_tokens_per_step,
        memory_limit=run.memory_limit,
        keep_snapshots=run.keep_snapshots,
    )
    check_limit(host, run.memory_limit)
    lines = [*lines, *left_out]
    for job in jobs:
        data = (*job.training_set.report, *job.training_set.warnings)
        lines += [f"{job.name}: {line}" for line in data]
    for line in lines:
        progress.message(line)
    return Setup(run, engine, builder, snapshot, progress, directory)


@contextmanager
def _taken_off_at_an_error(host: Host) -> Iterator[None]:
    """Leave a host as it was where an error or a signal ends a run."""
    before = set(host.adapters)
    try:
        yield
    except BaseException:
        for name in host.adapters.keys() - before:
            host.remove(name)
        raise


@contextmanager
def _shared_by(ranks: Ranks, host: Host) -> Iterator[None]:
    """Let ranks share a host's rows."""
    before, host.ranks = host.ranks, ranks
    try:
        yield
    finally:
        host.ranks = before


def _check_goes_with(launch: Launch, run: RunConfig, base: Any) -> None:
    """Refuse what several processes can't do together."""
    if launch.size > 1 and run.parallel.base == "fsdp" and base is not None:
        raise ConfigError(
            "parallel.base: fsdp takes a base model apart as it is loaded, got one that is loaded; "
            "leave `base` out, or take base: replicated"
        )
    if launch.size > 1 and run.parallel.base == "fsdp" and run.quantization is not None:
        raise ConfigError(
            "parallel.base: fsdp needs weights in floating point, got quantization; leave it out, "
            "or take base: replicated"
        )
    for job in run.all_jobs:
        check_adds_up(job, launch.size)


def _check_goes_with_ray(launch: Launch, watch: Any, base: Any, between_steps: Any) -> None:
    """Refuse what workers of a cluster can't do."""
    if launch.size > 1:
        raise ConfigError(
            f"--ray starts workers itself, got {launch.size} ranks; start it without torchrun"
        )
    for name, value in {"--watch": watch, "base": base, "between_steps": between_steps}.items():
        if value is not None:
            raise ConfigError(
                f"{name} does not go with --ray, whose workers train; leave one of them out"
            )


def _check_alike(ranks: Ranks, run: RunConfig, setup: Setup) -> None:
    """Check that all ranks are about to do the same."""
    jobs, snapshot = setup.engine.jobs.values(), setup.snapshot
    facts = {f"the data of job {job.name}": job.training_set.digest for job in jobs}
    facts["the run file"] = run.model_dump_json(exclude={"output_dir"})
    facts["the newest checkpoint"] = "" if snapshot is None else snapshot.directory.name
    if different := ranks.check_alike(facts):
        raise ConfigError(
            f"all {ranks.size} ranks must have the same run, these differ: {', '.join(different)}; "
            "let all machines see the same files, output_dir among them"
        )


def load_base(
    run: RunConfig, device: str, *, is_sharded: bool = False
) -> tuple[Host, PreTrainedTokenizerBase]:
    """Load a run's base model and attach a host to it."""
    model, tokenizer = load_base_model(
        run.base_model,
        run.dtype,
        device,
        run.attn_implementation,
        run.quantization,
        sharded=is_sharded,
    )
    return attach(model), tokenizer


def _read_snapshot(
    directory: RunDirectory, names: Sequence[str], run: RunConfig, host: Host
) -> tuple[Snapshot | None, list[str]]:
    """Read what a run goes on from."""
    snapshot, faults = directory.newest_snapshot(names)
    if snapshot is not None:
        check_same_run(snapshot, run, describe_base(host))
    elif faults:
        raise ConfigError("\n".join([*faults, "--resume needs a whole one, there is none"]))
    return snapshot, faults


def _build_jobs(
    builder: JobBuilder,
    run: RunConfig,
    configs: Sequence[JobConfig],
    snapshot: Snapshot | None,
) -> tuple[list[Job], Snapshot | None, list[str]]:
    """Build the jobs that are not done yet, those that had joined the run among them."""
    done = set() if snapshot is None else snapshot.done
    jobs = [builder.build(config) for config in configs if config.name not in done]
    if snapshot is None:
        return jobs, None, []
    first = {config.name for config in configs}
    in_file = {config.name for config in run.all_jobs}
    kept, faults = {}, []
    for name, record in snapshot.jobs.items():
        if name not in in_file and not record.joined_later:
            if record.result is None:
                faults.append(
                    f"warning: job {name} is no longer in the run file and is left out; put it "
                    "back to go on with it, before its snapshots are replaced"
                )
            continue
        if name not in first and record.result is None:
            try:
                jobs.append(builder.build(JobConfig.model_validate(record.settings)))
            except (LoraloomError, ValidationError) as error:
                faults.append(f"warning: job {name} had joined the run and is left out: {error}")
                continue
        kept[name] = record
    return jobs, replace(snapshot, jobs=kept), faults
