"""From a run file's settings to trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

import loraloom
from loraloom.config.job import JobConfig
from loraloom.config.objective import BASE_REFERENCE, DpoConfig
from loraloom.config.run import RunConfig
from loraloom.errors import ConfigError, LoraloomError
from loraloom.models.host import Host
from loraloom.models.loading import load_base_model
from loraloom.training.run.builder import JobBuilder
from loraloom.training.run.checkpoint import Snapshot, describe_changes
from loraloom.training.run.engine import Engine, Surroundings, describe_base
from loraloom.training.run.evaluation import Evaluation, Evaluator
from loraloom.training.run.job import Job
from loraloom.training.run.memory import check_memory, predict_memory
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import NoProgress, Progress
from loraloom.training.run.results import JobResult, describe_environment
from loraloom.training.run.tracking import check_trackers
from loraloom.training.run.watch import WatchedDirectory, WatchOptions, prepare_watched

if TYPE_CHECKING:
    from loraloom.training.run.sweep import Sweep

BetweenSteps = Callable[[Engine, JobBuilder], None]
"""Called between two fused steps: may build jobs, and call the engine's `add` and `stop`."""


def train(
    run: RunConfig,
    evaluator: Evaluator,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
    between_steps: BetweenSteps | None = None,
    watch: WatchOptions | None = None,
) -> list[JobResult]:
    """Train all jobs of a run on its base model.

    Everything is read and checked before the first file is written.

    Args:
        run: What the run file says.
        evaluator: Scores choice questions.
        resume: Go on from the newest checkpoint, if there is any.
        overwrite: Replace earlier results of these jobs.
        progress: Shows the run; None for nothing.
        command: What result.json says the run was started with.
        between_steps: As in `Engine.run`, with what builds further jobs.
        watch: A directory of job files to train as well.

    Returns:
        What became of each job; a failed one has an `error`.

    Raises:
        ConfigError: If results are in the way, another run writes there, there is nothing to
            resume, or a setting is wrong.
        ModelError, AdapterError, DataError: If the base model, an adapter or data can't be had.
        KeyboardInterrupt: After Ctrl-C, when everything is saved.
        SystemExit: After SIGTERM, likewise.
    """
    _check(run, resume=resume, overwrite=overwrite, watch=watch)
    model, tokenizer = load_base_model(
        run.base_model, run.dtype, run.device, run.attn_implementation
    )
    host = loraloom.attach(model)
    return train_on_host(
        host,
        tokenizer,
        run,
        evaluator,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
        command=command,
        between_steps=between_steps,
        watch=watch,
    )


def train_on_host(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    run: RunConfig,
    evaluator: Evaluator,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    command: str = "",
    between_steps: BetweenSteps | None = None,
    watch: WatchOptions | None = None,
) -> list[JobResult]:
    """Train as `train` does on a base model that is loaded already."""
    progress = progress or NoProgress()
    directory = _check(run, resume=resume, overwrite=overwrite, watch=watch)
    evaluation = Evaluation(host, tokenizer, evaluator)
    builder = JobBuilder(host, tokenizer, evaluation)
    with ExitStack() as held:
        if resume and directory.snapshots.exists():
            held.enter_context(directory.lock())
        snapshot, faults = _read_snapshot(directory, run, host) if resume else (None, [])
        jobs, snapshot, left_out = _build_jobs(builder, run, snapshot)
        environment = describe_environment(host.device, host.dtype, command)
        engine = Engine(
            host,
            jobs,
            evaluation,
            Surroundings(directory, progress, run.trackers, environment),
            max_tokens_per_step=run.max_tokens_per_step,
            memory_limit=run.memory_limit,
            keep_snapshots=run.keep_snapshots,
        )
        if jobs:
            prediction = predict_memory(host, jobs, run.max_tokens_per_step)
            check_memory(prediction, run.memory_limit, host.device)
            progress.message(f"memory: {prediction.describe()}")
        sweep = _sweep(run, directory, progress, builder, jobs)
        for line in (*faults, *left_out, *_describe_data(jobs)):
            progress.message(line)
        if snapshot is not None:
            progress.message(f"going on after {snapshot.round} fused steps")
            engine.load_state(snapshot)
        else:
            held.enter_context(directory.lock())
            # Another run may have ended just now.
            directory.check(resume=resume, overwrite=overwrite)
            directory.prepare([job.name for job in run.all_jobs])
            engine.save_state()
        return _run(engine, builder, sweep, between_steps, watch, progress)


def _read_snapshot(
    directory: RunDirectory, run: RunConfig, host: Host
) -> tuple[Snapshot | None, list[str]]:
    """Read what a run goes on from.

    Returns:
        The newest whole snapshot, None where nothing was saved, and what is wrong with newer ones.

    Raises:
        ConfigError: If none is whole, or it is of a run with other settings.
    """
    snapshot, faults = directory.snapshots.newest()
    if snapshot is not None:
        _check_same_run(snapshot, run, describe_base(host))
    elif faults:
        raise ConfigError("\n".join([*faults, "--resume needs a whole one, there is none"]))
    return snapshot, faults


def _build_jobs(
    builder: JobBuilder, run: RunConfig, snapshot: Snapshot | None
) -> tuple[list[Job], Snapshot | None, list[str]]:
    """Build what is not done yet.

    Returns:
        The jobs, the snapshot without those that are no longer trained, and what is wrong with
        those that can't be built any more.
    """
    done = set() if snapshot is None else snapshot.done
    jobs = [builder.build(config) for config in run.first_jobs if config.name not in done]
    if snapshot is None:
        return jobs, None, []
    joined, faults = _rebuild_joined(builder, run, snapshot)
    jobs += joined
    return jobs, _restrict(snapshot, {*done, *(job.name for job in jobs)}, run), faults


def _sweep(
    run: RunConfig,
    directory: RunDirectory,
    progress: Progress,
    builder: JobBuilder,
    jobs: Sequence[Job],
) -> Sweep | None:
    if run.sweep is None:
        return None
    from loraloom.training.run.sweep import Sweep  # it needs Optuna

    return Sweep(run, directory, progress, builder.build, jobs)


def _run(
    engine: Engine,
    builder: JobBuilder,
    sweep: Sweep | None,
    between_steps: BetweenSteps | None,
    watch: WatchOptions | None,
    progress: Progress,
) -> list[JobResult]:
    """Train an engine's jobs, with what happens between their steps."""
    if sweep is not None:
        sweep.open()

    def callback(engine: Engine) -> None:
        if sweep is not None:
            sweep.between_steps(engine)
        if between_steps is not None:
            between_steps(engine, builder)

    if watch is not None:
        results = WatchedDirectory(watch, engine, builder, progress.message).run(callback)
    else:
        results = engine.run(callback)
    if sweep is not None:
        sweep.finish(engine)
    return results


def _check(
    run: RunConfig, *, resume: bool, overwrite: bool, watch: WatchOptions | None
) -> RunDirectory:
    directory = RunDirectory(run.output_dir)
    directory.check(resume=resume, overwrite=overwrite)
    _check_sources(run, directory)
    check_trackers(run.trackers)
    if watch is not None:
        prepare_watched(watch.path)
    return directory


def _check_sources(run: RunConfig, directory: RunDirectory) -> None:
    """Check that no adapter that a job reads is one that the run will replace.

    Raises:
        ConfigError: If one is.
    """
    written = {directory.job(job.name).resolve(): job.name for job in run.all_jobs}
    for job in run.all_jobs:
        for setting, source in _sources(job).items():
            path = Path(source).resolve()
            replaced = next((written[one] for one in (path, *path.parents) if one in written), None)
            if replaced is not None:
                raise ConfigError(
                    f"job {job.name}: {setting} must not be in what the run writes, got {source}, "
                    f"where job {replaced} goes; give another output_dir or name"
                )


def _sources(job: JobConfig) -> dict[str, str]:
    """The adapters that a job reads, by setting."""
    sources, objective = {}, job.train.objective
    if job.start_from is not None:
        sources["start_from"] = job.start_from
    if isinstance(objective, DpoConfig) and objective.reference != BASE_REFERENCE:
        sources["train.objective.reference"] = objective.reference
    return sources


def _rebuild_joined(
    builder: JobBuilder, run: RunConfig, snapshot: Snapshot
) -> tuple[list[Job], list[str]]:
    """Build the jobs again that had joined a run.

    Returns:
        The jobs, and what is wrong with those that can't be built any more.
    """
    names = {job.name for job in run.first_jobs} | snapshot.done
    jobs, faults = [], []
    for name, record in snapshot.jobs.items():
        if name in names or not record.joined_later:
            continue
        try:
            jobs.append(builder.build(JobConfig.model_validate(record.settings)))
        except LoraloomError as error:
            faults.append(f"warning: {error}; it had joined the run and is left out")
    return jobs, faults


def _restrict(snapshot: Snapshot, names: set[str], run: RunConfig) -> Snapshot:
    """Leave out what a run file no longer has, and what can't be built any more."""
    in_file = {job.name for job in run.all_jobs}
    kept = {
        name: record
        for name, record in snapshot.jobs.items()
        if name in names and (record.joined_later or name in in_file)
    }
    return replace(snapshot, jobs=kept)


def _describe_data(jobs: Sequence[Job]) -> list[str]:
    return [f"{job.name}: {line}" for job in jobs for line in job.training_set.report]


def _check_same_run(snapshot: Snapshot, run: RunConfig, base: dict[str, Any]) -> None:
    """Check that what goes on is what was saved.

    Raises:
        ConfigError: If the base model or a setting of a job is another one.
    """
    changed = [f"base {name}" for name, value in base.items() if snapshot.base.get(name) != value]
    for job in run.all_jobs:
        record = snapshot.jobs.get(job.name)
        if record is not None:
            changes = describe_changes(_fixed(record.settings), _fixed(job.model_dump(mode="json")))
            changed += [f"job {job.name}: {change}" for change in changes]
    if changed:
        raise ConfigError(
            "--resume needs the settings that the run began with, these differ: "
            f"{'; '.join(changed)}; set them back, or give --overwrite to begin again"
        )


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what does not change a job's result."""
    return {name: value for name, value in settings.items() if name != "priority"}
