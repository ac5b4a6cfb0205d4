"""What must hold before a run begins or goes on, wherever its jobs train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.config.job import JobConfig
from loraloom.config.objective import BASE_REFERENCE, DpoConfig
from loraloom.config.paths import local_path
from loraloom.config.run import RunConfig
from loraloom.errors import ConfigError
from loraloom.training.run.checkpoint import Snapshot, describe_changes
from loraloom.training.run.outputs import RunDirectory


def check_adds_up(job: JobConfig, num_ranks: int) -> None:
    """Check that a job can share its rows among so many ranks."""
    if num_ranks > 1 and not job.adapter.adds_up_over_ranks:
        raise ConfigError(
            f"job {job.name}: method {job.adapter.method} needs a single process, as its "
            f"router loss joins all tokens, got {num_ranks} ranks; start it without torchrun"
        )


def check_sources(jobs: Sequence[JobConfig], directory: RunDirectory) -> None:
    """Check that no adapter that a job reads is one that the jobs will replace."""
    jobs_by_path = {directory.job(job.name).resolve(): job.name for job in jobs}
    for job in jobs:
        for setting, source in _sources(job).items():
            path = local_path(source, f"job {job.name}: {setting}").resolve()
            for replaced in (path, *path.parents):
                if replaced in jobs_by_path:
                    raise ConfigError(
                        f"job {job.name}: {setting} must not be in what the run writes, got "
                        f"{source}, where job {jobs_by_path[replaced]} goes; give another "
                        "output_dir or name"
                    )


def _sources(job: JobConfig) -> dict[str, str]:
    """The adapters that a job reads, by setting."""
    sources, objective = {}, job.train.objective
    if job.start_from is not None:
        sources["start_from"] = job.start_from
    if isinstance(objective, DpoConfig) and objective.reference != BASE_REFERENCE:
        sources["train.objective.reference"] = objective.reference
    return sources


def check_same_run(snapshot: Snapshot, run: RunConfig, base: dict[str, Any]) -> None:
    """Check that what goes on is what was saved."""
    changed = [f"base {name}" for name, value in base.items() if snapshot.base.get(name) != value]
    for job in run.all_jobs:
        record = snapshot.jobs.get(job.name)
        if record is not None:  # priority changes no job's result
            saved, now = (
                {**s, "priority": None} for s in (record.settings, job.model_dump(mode="json"))
            )
            changed += [f"job {job.name}: {change}" for change in describe_changes(saved, now)]
    if changed:
        raise ConfigError(
            "--resume needs the settings that the run began with, these differ: "
            f"{'; '.join(changed)}; set them back, or give --overwrite to begin again"
        )
