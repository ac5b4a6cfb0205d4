"""`train` on the workers of a cluster: the same run, the same results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.config.run import RunConfig
from loraloom.errors import ConfigError, TrainingError
from loraloom.training.cluster.cluster import Cluster
from loraloom.training.cluster.crew import Crew, CrewLost
from loraloom.training.cluster.ray_crew import check_worker_device, ray_crew
from loraloom.training.cluster.remote_job import RemoteJob
from loraloom.training.run.checkpoint import Snapshot
from loraloom.training.run.checks import check_same_run, check_sources
from loraloom.training.run.inputs import check_inputs
from loraloom.training.run.outputs import RunDirectory
from loraloom.training.run.progress import Progress
from loraloom.training.run.results import JobResult, parse_result
from loraloom.training.run.tracking import check_trackers
from loraloom.training.step.optimizers import rehearse

if TYPE_CHECKING:
    from loraloom.training.run.sweep import Sweep


def train_with_ray(
    run: RunConfig,
    address: str,
    num_workers: int | None,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    command: str,
) -> list[JobResult]:
    """Train a run's jobs on the workers of a Ray cluster; see `train`."""
    check_worker_device(run.device)
    if run.parallel.base != "replicated":
        raise ConfigError(
            "parallel.base: fsdp needs torchrun, got --ray, whose workers have a base model each"
        )
    directory = RunDirectory(run.output_dir, by_job=True)
    directory.check(resume=resume, overwrite=overwrite)
    check_sources(run.all_jobs, directory)
    check_trackers(run.trackers)
    for job in run.all_jobs:
        rehearse(job.train, job.name)
    progress.message("starting Ray" if address == "auto" else f"connecting to Ray at {address}")
    with ray_crew(run, address, num_workers, command) as (crew, size):
        return train_with(
            crew, size, run, directory, resume=resume, overwrite=overwrite, progress=progress
        )


def train_with(
    crew: Crew,
    num_workers: int,
    run: RunConfig,
    directory: RunDirectory,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress,
) -> list[JobResult]:
    """Train a run's jobs on so many workers of a crew; see `train`."""
    with ExitStack() as stack:
        stack.enter_context(_told_as_error())
        cluster = Cluster(run, crew, directory, progress)
        stack.callback(cluster.disband)
        goes_on = resume and directory.job_snapshots.exists()
        earlier: dict[str, Snapshot] = {}
        faults: list[str] = []
        if goes_on:
            stack.enter_context(directory.lock())
            earlier, faults = directory.job_snapshots.newest()
        seconds = max((snapshot.seconds for snapshot in earlier.values()), default=0.0)
        cluster.assemble(num_workers, seconds)
        if goes_on:
            _go_on(cluster, earlier, faults, seconds, run, progress)
        jobs = _build_jobs(cluster, run, earlier)
        for job in jobs:
            for line in job.measured.report:
                progress.message(f"{job.name}: {line}")
        sweep = None
        if run.sweep is not None:
            from loraloom.training.run.sweep import Sweep  # it needs Optuna

            sweep = Sweep(run, directory, progress, cluster.build, jobs, is_new=not goes_on)
        if not goes_on:
            stack.enter_context(directory.lock())
            directory.check(resume=resume, overwrite=overwrite)  # another run may have ended now
            directory.prepare([job.name for job in run.all_jobs])
        for job in jobs:
            cluster.add(job, overwrite=overwrite or not goes_on)
        if sweep is not None:
            _open_sweep(sweep, cluster, directory, earlier)
        results = cluster.run(sweep)
        if sweep is not None:
            sweep.finish(cluster)
        return results


@contextmanager
def _told_as_error() -> Iterator[None]:
    try:
        yield
    except CrewLost as lost:
        raise TrainingError(str(lost)) from lost


def _go_on(
    cluster: Cluster,
    snapshots: dict[str, Snapshot],
    faults: Sequence[str],
    seconds: float,
    run: RunConfig,
    progress: Progress,
) -> None:
    """Go on from the newest snapshot of each job."""
    if not snapshots:
        raise ConfigError("\n".join([*faults, "--resume needs a whole one, there is none"]))
    for fault in faults:
        progress.message(fault)
    for snapshot in snapshots.values():
        check_same_run(snapshot, run, dict(cluster.base))
    records = {name: snapshot.jobs[name] for name, snapshot in snapshots.items()}
    results = {
        name: parse_result(record.result)
        for name, record in records.items()
        if record.result is not None
    }
    cluster.go_on(results, seconds)
    progress.message(f"going on with {len(results)} of {len(snapshots)} jobs done")


def _build_jobs(cluster: Cluster, run: RunConfig, earlier: dict[str, Snapshot]) -> list[RemoteJob]:
    """Let workers build the jobs that are not done yet."""
    configs = [config for config in run.first_jobs if config.name not in cluster.results]
    jobs = cluster.build_all(configs)
    saved = {name: one.jobs[name].inputs for name, one in earlier.items()}
    check_inputs(saved, {job.name: job.measured.inputs for job in jobs})
    return jobs


def _open_sweep(
    sweep: Sweep[RemoteJob],
    cluster: Cluster,
    directory: RunDirectory,
    earlier: dict[str, Snapshot],
) -> None:
    """Go on with a sweep's study as it is, and let the jobs wait that have begun in it.

    The journal may be ahead of a job's snapshot: what it has decided stands, and the job comes to
    the same place again.
    """
    journal: Path = directory.sweep_journal
    sweep.open(journal.stat().st_size if journal.exists() else 0)
    for config, first_round, is_told in sweep.begun():
        if config.name in cluster.results and not is_told and sweep.decides:
            micro_batches = earlier[config.name].jobs[config.name].micro_batches
            cluster.hold_back(config, first_round, micro_batches)
        elif config.name not in cluster.jobs and config.name not in cluster.results:
            job = cluster.build(config)
            sweep.set_rungs(job)
            cluster.add(job, overwrite=True)
        if config.name in cluster.jobs:
            cluster.jobs[config.name].first_round = first_round
