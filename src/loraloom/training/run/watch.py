"""A directory of job files: what is dropped into it is trained, and each file is told how it went.

    DIR/math.yaml          one job, as in `jobs:` of a run file
    DIR/math.state.json    written beside it: queued, running, done, failed or stopped, and why

A file is read once it has not changed between two looks. One that was dealt with is read again when
it is edited; edits have no effect on a job that trains. Deleting the file of a job that trains
stops the job.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from loraloom.config.loading import load_job_config
from loraloom.durable import write_json
from loraloom.errors import ConfigError, LoraloomError
from loraloom.training.run.builder import JobBuilder
from loraloom.training.run.engine import Engine
from loraloom.training.run.results import JobResult, Status

LOOK_S = 1.0
PROGRESS_S = 5.0
SUFFIX = ".yaml"

State = Literal["queued", "running", "done", "failed", "stopped"]

_ENDS: dict[Status, State] = {
    "finished": "done",
    "stopped early": "done",
    "stopped": "stopped",
    "failed": "failed",
}
"""From a result's status to a state."""


@dataclass(frozen=True)
class FileState:
    """What a state file says. Times are in UTC.

    Args:
        file: The job file's name.
        state: Where its job is.
        job: Name of the job, once it trains.
        reason: Why it failed or was stopped, or what it waits for.
        step: Steps done.
        total_steps: Steps of the whole job.
        loss: Of the last step.
        queued_at: When the file was seen.
        started_at: When the job joined.
        ended_at: When it was done.
        result: Directory of the adapter.
        sha256: Of the file's content that this is about.
    """

    file: str
    state: State
    job: str | None = None
    reason: str | None = None
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    queued_at: str | None = None
    started_at: str | None = None
    ended_at: str | None = None
    result: str | None = None
    sha256: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether something is still to come."""
        return self.state in ("queued", "running")


@dataclass(frozen=True)
class WatchOptions:
    """Which directory to watch, and how.

    Args:
        path: The directory; see `prepare_watched`.
        overwrite: Replace results of earlier runs' jobs.
        exit_when_idle: End when all jobs and all files are done, in place of waiting for more.
    """

    path: Path
    overwrite: bool = False
    exit_when_idle: bool = False


class WatchedDirectory:
    """Brings job files to an engine, and its news back beside them.

    Args:
        options: Which directory, and how.
        engine: That the jobs join; those that it has already are found by their state files.
        builder: Of the jobs.
        say: Tells the user.
    """

    def __init__(
        self,
        options: WatchOptions,
        engine: Engine,
        builder: JobBuilder,
        say: Callable[[str], None],
    ):
        self.options = options
        self.path = options.path
        self._engine = engine
        self._builder = builder
        self._say = say
        self._next_look = self._next_progress = 0.0
        self._versions: dict[Path, tuple[int, int]] = {}
        self._published: dict[Path, FileState] = {}
        self._told: set[Path] = set()
        self._states = dict(map(self._take_over, _read_states(self.path)))

    @property
    def is_idle(self) -> bool:
        """Whether every file is dealt with."""
        return not any(state.is_open for state in self._states.values())

    def run(self, between_steps: Callable[[Engine], None] | None = None) -> list[JobResult]:
        """Train what is there and what comes, until Ctrl-C or SIGTERM.

        Args:
            between_steps: As in `Engine.run`.

        Returns:
            What became of each job, where the end is when all is done.
        """

        def look_and_call(engine: Engine) -> None:
            self._look_if_due()
            if between_steps is not None:
                between_steps(engine)

        try:
            while True:
                results = self._engine.run(look_and_call)
                if not self._wait_for_jobs():
                    return results
        except (KeyboardInterrupt, SystemExit):
            self._pause()
            raise

    def look(self) -> None:
        """Take in new and deleted files, and write what has changed."""
        now = time.monotonic()
        self._next_look = now + LOOK_S
        versions = self._read_directory()
        if versions is None:
            return
        for path in self._states.keys() - versions.keys():
            self._forget(path)
        for path, version in versions.items():
            self._follow(path, is_stable=self._versions.get(path) == version)
        self._versions = versions
        self._publish(with_progress=now >= self._next_progress)
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_S

    def _read_directory(self) -> dict[Path, tuple[int, int]] | None:
        """Return the job files; None if the directory can't be read: no file was deleted then."""
        try:
            versions = _job_files(self.path)
        except OSError as error:
            self._warn_once(self.path, f"can't be read, jobs go on: {error}")
            return None
        self._told.discard(self.path)
        return versions

    def _wait_for_jobs(self) -> bool:
        """Wait until the engine has something to do; False: nothing is to come."""
        self.look()
        while not self._engine.jobs:
            if self.options.exit_when_idle and self.is_idle:
                return False
            time.sleep(LOOK_S)
            self.look()
        return True

    def _look_if_due(self) -> None:
        if time.monotonic() >= self._next_look:
            self.look()

    def _take_over(self, state: FileState) -> tuple[Path, FileState]:
        """Go on from a state file; what was to come and is not in the engine waits again.

        What is done by an earlier run has nothing to do with a job of this one, whatever its name.
        """
        path = self.path / state.file
        if state.job in self._engine.joined:
            return path, state
        if state.is_open:
            return path, FileState(state.file, "queued", queued_at=state.queued_at)
        self._published[path] = state = replace(state, job=None)
        return path, state

    def _follow(self, path: Path, *, is_stable: bool) -> None:
        """Bring a file one step further."""
        state = self._states.get(path)
        if state is None:
            self._states[path] = FileState(path.name, "queued", queued_at=_now())
        elif state.job in self._engine.jobs or (state.job is not None and state.is_open):
            self._states[path] = self._news(path, state)
        elif is_stable and state.state == "queued":
            self._states[path] = self._submit(path, state)
        elif is_stable and state.sha256 != _hash(path):
            self._states[path] = FileState(path.name, "queued", queued_at=_now())

    def _submit(self, path: Path, state: FileState) -> FileState:
        """Let a file's job join; whatever is wrong with it is told in its state."""
        state = replace(state, sha256=_hash(path))
        try:
            name = self._join(path)
        except Exception as error:
            reason = str(error) if isinstance(error, LoraloomError) else repr(error)
            self._say(f"{path}: failed: {reason}")
            return replace(state, state="failed", reason=reason, ended_at=_now())
        self._say(f"{path}: job {name} joins")
        return self._news(path, replace(state, job=name, started_at=_now()))

    def _join(self, path: Path) -> str:
        config = load_job_config(path)
        if config.name in self._engine.jobs or config.name in self._engine.results:
            raise ConfigError(f"job name must be new in this run, got {config.name!r} again")
        self._engine.add(self._builder.build(config), overwrite=self.options.overwrite)
        return config.name

    def _news(self, path: Path, state: FileState) -> FileState:
        """Say how a job that the engine knows gets on."""
        assert state.job is not None
        job = self._engine.jobs.get(state.job)
        if job is None:
            return _ended(self._engine.results[state.job], replace(state, sha256=_hash(path)))
        return replace(
            state,
            state="running",
            reason=None,
            step=job.position.step,
            total_steps=job.total_steps,
            loss=job.position.last_loss,
        )

    def _forget(self, path: Path) -> None:
        """Follow a file's deletion: its job is stopped, or no longer waits."""
        state = self._states.pop(path)
        self._published.pop(path, None)
        if state.job in self._engine.jobs:
            result = self._engine.stop(state.job, f"its file {path} was deleted")
            self._write(path, _ended(result, state))
        elif state.state == "queued":
            _state_file(path).unlink(missing_ok=True)

    def _pause(self) -> None:
        """Say of jobs that were interrupted that they wait."""
        for path, state in self._states.items():
            if state.job in self._engine.jobs:
                reason = "the run was interrupted; it goes on with --resume"
                self._states[path] = replace(self._news(path, state), state="queued", reason=reason)
        self._publish(with_progress=True)

    def _publish(self, *, with_progress: bool) -> None:
        """Write the state files that changed; a job's progress only now and then."""
        for path, state in self._states.items():
            before = self._published.get(path)
            is_progress = before is not None and before.state == state.state
            if state != before and (with_progress or not is_progress):
                self._write(path, state)

    def _write(self, path: Path, state: FileState) -> None:
        try:
            write_json(_state_file(path), asdict(state) | {"updated_at": _now()})
            self._published[path] = state
            self._told.discard(path)
        except OSError as error:
            self._warn_once(path, f"has a state file that can't be written: {error}")

    def _warn_once(self, path: Path, fault: str) -> None:
        """Tell a fault, unless it was told since all was well."""
        if path not in self._told:
            self._say(f"warning: {path} {fault}")
        self._told.add(path)


def prepare_watched(path: Path) -> None:
    """Make a directory to watch, if it isn't there.

    Raises:
        ConfigError: If it can't be made, or not be read and written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--watch must name a directory, got {path}: {error}") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(
            f"--watch must name a directory that can be read and written to, got {path}"
        )


def _ended(result: JobResult, state: FileState) -> FileState:
    reason = result.error or result.stop_reason
    if result.status == "stopped early":
        reason = "its metric no longer got better"
    return replace(
        state,
        state=_ENDS[result.status],
        reason=reason,
        step=result.steps,
        ended_at=_now(),
        result=result.directory,
    )


def _job_files(directory: Path) -> dict[Path, tuple[int, int]]:
    """The job files, with the time and size by which a change shows.

    Raises:
        OSError: If the directory can't be read.
    """
    files = {}
    for path in sorted(directory.iterdir()):  # glob is silent about what it can't read
        if path.suffix != SUFFIX or path.name.startswith("."):
            continue
        try:
            status = path.stat()
        except OSError:  # deleted just now, or a link to nothing
            continue
        if stat.S_ISREG(status.st_mode):
            files[path] = (status.st_mtime_ns, status.st_size)
    return files


def _read_states(directory: Path) -> list[FileState]:
    """The state files that an earlier run left; one that can't be read counts for nothing."""
    states = []
    for file in sorted(directory.glob("*.state.json")):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            values.pop("updated_at")
            state = FileState(**values)
            is_beside = _state_file(directory / state.file) == file
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if is_beside:
            states.append(state)
    return states


def _state_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.state.json")


def _hash(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
