"""The directory of a run's results, and what may be in it before the run begins.

<output_dir>/<job>/                     the adapter's files, metrics.jsonl, result.json
<output_dir>/<job>/checkpoints/last/    the adapter after its last step
<output_dir>/<job>/checkpoints/best/    the adapter at its best evaluation
<output_dir>/.checkpoints/              what --resume needs
<output_dir>/.checkpoints/jobs/         the same where several workers train, for each job apart
<output_dir>/sweep.csv, .png, .journal  the jobs of a sweep, compared; Optuna's record of them

No job can be called .checkpoints: names begin with a letter or digit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loraloom.durable import cut_torn_line, remove, remove_leftovers
from loraloom.errors import ConfigError
from loraloom.formats.disk import ADAPTER_FILES
from loraloom.formats.files import read_adapter, write_adapter
from loraloom.models.host import Host
from loraloom.training.checkpoint import JobSnapshots, Moment, Snapshot, SnapshotStore
from loraloom.training.job import Job
from loraloom.training.results import RESULT_FILE, JobResult, result_card
from loraloom.training.tracking import METRICS_FILE, TENSORBOARD_DIRECTORY, WANDB_DIRECTORY

_CHECKPOINTS = "checkpoints"
_SNAPSHOTS = ".checkpoints"
_LOCK_FILE = ".lock"
_JOB_FILES = (*ADAPTER_FILES, METRICS_FILE, RESULT_FILE)
_JOB_DIRECTORIES = (_CHECKPOINTS, TENSORBOARD_DIRECTORY, WANDB_DIRECTORY)


def _for_its_owner(method: Callable[..., None]) -> Callable[..., None]:
    """Leave a method to the process whose directory it is."""

    @wraps(method)
    def owned(directory: RunDirectory, *args: Any, **options: Any) -> None:
        if not directory.is_read_only:
            method(directory, *args, **options)

    return owned


class RunDirectory:
    """Where a run's results go."""

    def __init__(self, path: Path, *, is_read_only: bool = False, by_job: bool = False):
        self.path = path
        self.is_read_only = is_read_only
        self.by_job = by_job
        self.snapshots = SnapshotStore(path / _SNAPSHOTS)
        self.job_snapshots = JobSnapshots(path / _SNAPSHOTS / "jobs")
        self.sweep_table = path / "sweep.csv"
        self.sweep_picture = path / "sweep.png"
        self.sweep_journal = path / "sweep.journal"

    def job(self, name: str) -> Path:
        """Directory of a job's results."""
        return self.path / name

    def last(self, name: str) -> Path:
        """Directory of a job's last weights."""
        return self.job(name) / _CHECKPOINTS / "last"

    def best(self, name: str) -> Path:
        """Directory of a job's best weights."""
        return self.job(name) / _CHECKPOINTS / "best"

    def metrics(self, name: str) -> Path:
        """A job's metrics.jsonl."""
        return self.job(name) / METRICS_FILE

    def newest_snapshot(self, jobs: Sequence[str]) -> tuple[Snapshot | None, list[str]]:
        """Read what jobs go on from, and what is wrong with newer snapshots."""
        return self.job_snapshots.newest(jobs) if self.by_job else self.snapshots.newest()

    @_for_its_owner
    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Check that the run may write here. Nothing is written."""
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; give one")
        with self._writing():
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"output_dir must be a directory, got the file {self.path}")
            self._check_writable()
            found = [self.snapshots.exists(), self.job_snapshots.exists()]
            has_results = bool(self._entries()) or any(found)
        if overwrite or not has_results:
            return
        if not resume:
            entries = ", ".join(self._entries()[:3] or [_SNAPSHOTS])
            raise ConfigError(
                f"output_dir must be new or empty, got {self.path}, which has {entries}; "
                "name another, or give --resume to go on from "
                "its checkpoints or --overwrite to replace the jobs' results"
            )
        others, own = found if self.by_job else found[::-1]
        if others and not own:
            raise ConfigError(
                f"--resume needs a run that was trained {'with' if self.by_job else 'without'} "
                f"--ray, as this one is to be, {self.path} was not; "
                f"{'leave --ray out' if self.by_job else 'give --ray auto'}"
            )
        if not own:
            raise ConfigError(
                f"--resume needs checkpoints, {self.path} has results without any; "
                "name another output_dir, or give --overwrite"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the directory, until the end or the process's death."""
        if self.is_read_only:
            yield
            return
        lock = FileLock(self.snapshots.directory / _LOCK_FILE, timeout=0)
        with self._writing():
            self.snapshots.directory.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise ConfigError(
                    f"output_dir must be one that no other run writes to, {self.path} is in use by "
                    "another; wait for its end, stop it, or name another directory"
                ) from error
            for directory in (self.path, self.snapshots.directory):
                remove_leftovers(directory)
        try:
            yield
        finally:
            lock.release()

    @_for_its_owner
    def prepare(self, jobs: Sequence[str]) -> None:
        """Delete earlier results of these jobs, and all checkpoints of the run."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self.snapshots.clear()
            self.job_snapshots.clear()
            for file in (self.sweep_table, self.sweep_picture, self.sweep_journal):
                file.unlink(missing_ok=True)
            for name in jobs:
                self._clear(name)

    @_for_its_owner
    def prepare_job(self, name: str, *, overwrite: bool = False) -> None:
        """Make room for a job that joins; what a run that died left of it is deleted."""
        if not overwrite:
            self.check_new(name)
        with self._writing():
            self._clear(name)

    @_for_its_owner
    def check_new(self, name: str) -> None:
        """Check that a job that begins replaces nothing."""
        for file in (RESULT_FILE, *ADAPTER_FILES):
            if (self.job(name) / file).exists():
                raise ConfigError(
                    f"job {name} must be new in {self.path}, but there is "
                    f"{self.job(name) / file}; take another name, or move its directory away"
                )

    @_for_its_owner
    def reopen(self, host: Host, job: Job) -> None:
        """Bring the files of a job that goes on back to where its snapshot is.

        A process that was killed may have got further: with better weights, or to the job's end.
        """
        name = job.name
        with self._writing():
            remove(self.job(name) / RESULT_FILE)
            if job.selection.step is None:
                remove(self.best(name))
                return
        if job.best is None:
            job.best = read_adapter(self.best(name), host.base)[1]
        self.write_best(host, job)

    @_for_its_owner
    def tidy(self, name: str) -> None:
        """Delete what killed writers left in a job's directory."""
        with self._writing():
            for directory in (self.job(name), self.best(name), self.last(name)):
                remove_leftovers(directory)

    @_for_its_owner
    def write_best(self, host: Host, job: Job) -> None:
        """Write the best weights that a job has kept."""
        assert job.best is not None, "an evaluation has chosen some"
        directory = self.best(job.name)
        config, prompt = job.adapter.config, job.adapter.prompt
        write_adapter(directory, config, job.best, host.base, prompt=prompt, overwrite=True)

    @_for_its_owner
    def write_job(self, host: Host, job: Job, result: JobResult) -> None:
        """Write a job's last weights, the adapter's files and result.json.

        The adapter's files are its best weights where an evaluation has chosen any, else the last.
        """
        name, base, tensors = job.name, host.base, job.adapter.tensors()
        if job.best is not None:
            self.write_best(host, job)  # again: what is there may be half of it
            tensors = job.best
        host.save(name, self.last(name), overwrite=True)
        card = result_card(result, job, base)
        config, prompt = job.adapter.config, job.adapter.prompt
        write_adapter(self.job(name), config, tensors, base, card, prompt=prompt, overwrite=True)
        self.write_result(name, result)

    @_for_its_owner
    def write_result(self, name: str, result: JobResult) -> None:
        """Write a job's result.json alone."""
        result.write(self.job(name))

    @_for_its_owner
    def cut_metrics(self, name: str, num_bytes: int) -> None:
        """Cut a job's metrics.jsonl: what followed will be logged again."""
        cut_torn_line(self.metrics(name), num_bytes)

    @_for_its_owner
    def write_snapshot(
        self, moment: Moment, states: Mapping[str, dict[str, Any]], *, keep: int
    ) -> None:
        """Write a snapshot, or one of each job; see `SnapshotStore.write`."""
        store = self.job_snapshots if self.by_job else self.snapshots
        store.write(moment, states, keep=keep)

    def _clear(self, name: str) -> None:
        for entry in (*_JOB_FILES, *_JOB_DIRECTORIES):
            remove(self.job(name) / entry)
        remove_leftovers(self.job(name))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"output_dir must be where files can be written, got {self.path}: {error}; "
                "name another"
            ) from error

    def _entries(self) -> list[str]:
        if not self.path.exists():
            return []
        return sorted(entry.name for entry in self.path.iterdir() if entry.name != _SNAPSHOTS)

    def _check_writable(self) -> None:
        existing = nearest_existing(self.path)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(
                f"output_dir must be where files can be written, got {self.path}: "
                f"{existing} is no directory that can be written to"
            )


def nearest_existing(path: Path) -> Path:
    """Return a path, or the directory above it that is nearest to it among those that exist."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())
