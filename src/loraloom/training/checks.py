"""What must hold before a run begins or goes on: its settings, and what its jobs learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from loraloom.config.text import local_path
from loraloom.data.tasks import questions_digest
from loraloom.errors import ConfigError
from loraloom.eval.provenance import adapter_digest
from loraloom.models.host import Host
from loraloom.training.checkpoint import Snapshot, describe_changes
from loraloom.training.evaluation import Evaluation
from loraloom.training.job import Job
from loraloom.training.outputs import RunDirectory
from loraloom.training.settings import BASE_REFERENCE, DpoConfig, JobConfig, RunConfig


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
                {**settings, "priority": None}
                for settings in (as_of_now(record.settings), job.model_dump(mode="json"))
            )
            changed += [f"job {job.name}: {change}" for change in describe_changes(saved, now)]
    if changed:
        raise ConfigError(
            "--resume needs the settings that the run began with, these differ: "
            f"{'; '.join(changed)}; set them back, or give --overwrite to begin again"
        )


def as_of_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what this version makes of a job's settings that an older one saved.

    Settings that are new have their defaults, and those of `init: eva`, which had no effect on
    other jobs, are left out.
    """
    adapter = {name: value for name, value in settings["adapter"].items() if name != "eva"}
    try:
        return JobConfig.model_validate({**settings, "adapter": adapter}).model_dump(mode="json")
    except ValidationError:
        return settings


def input_digests(host: Host, job: Job, evaluation: Evaluation) -> dict[str, str]:
    """Hash a job's encoded examples, its questions and its reference's weights."""
    digests = {"examples": job.training_set.digest}
    if job.config.eval:
        sets = (evaluation.questions.get(config, []) for config in job.config.eval)
        digests["questions"] = " ".join(map(questions_digest, sets))
    if job.reference is not None and job.reference.adapter_name is not None:
        digests["reference"] = adapter_digest(host.adapter(job.reference.adapter_name))
    return digests


def check_inputs(
    saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> None:
    """Check that jobs keep what they began with (older snapshots have no hashes)."""
    changed = [
        f"job {name}: {what}"
        for name, inputs in now.items()
        if name in saved
        for what, digest in inputs.items()
        if saved[name].get(what, digest) != digest
    ]
    if changed:
        raise ConfigError(
            "--resume needs the data that the run began with, it has changed: "
            f"{'; '.join(changed)}; put it back, or give --overwrite to begin again"
        )
