"""A directory of job files: what is dropped into it is trained, and each file is told how it went.

    DIR/math.yaml          one job, as in `jobs:` of a run file
    DIR/math.state.json    written beside it: queued, running, done, failed or stopped, and why

A file is read once it has not changed between two looks. One that was dealt with is read again when
it is edited; edits have no effect on a job that trains. Deleting the file of a job that trains
stops the job.
"""

from __future__ import annotations

import hashlib
import logging
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import ConfigDict, TypeAdapter

from loraloom.config.text import read_json
from loraloom.durable import write_json
from loraloom.errors import ConfigError, LoraloomError, shown
from loraloom.training.parallel import Lead
from loraloom.training.results import JobResult
from loraloom.training.settings import load_job_config

LOOK_S = 1.0
PROGRESS_S = 5.0
_LOCK_FILE = ".loraloom.lock"

_log = logging.getLogger(__name__)

Version = tuple[int, int]
"""Time and size of a file, by which a change shows."""

_UNSEEN: Version = (0, -1)
"""Of a file that can't be looked at: it is there, and its job waits or fails with the reason."""


@dataclass(frozen=True)
class FileState:
    """What a state file says. Times are in UTC.

    Args:
        file: The job file's name.
        state: Where its job is: queued, running, done, failed or stopped.
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
    state: Literal["queued", "running", "done", "failed", "stopped"] = "queued"
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

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def is_open(self) -> bool:
        """Whether something is still to come."""
        return self.state in ("queued", "running")


@dataclass(frozen=True)
class WatchOptions:
    """Which directory to watch, and how.

    Args:
        path: The directory.
        overwrite: Replace results of earlier runs' jobs.
        exit_when_idle: End when all jobs and all files are done, in place of waiting for more.
    """

    path: Path
    overwrite: bool = False
    exit_when_idle: bool = False


class Inbox:
    """Brings job files to an engine, and its news back beside them.

    As a context it says of jobs that were interrupted that they wait.
    """

    def __init__(
        self,
        options: WatchOptions,
        engine: Lead,
        say: Callable[[str], None],
    ):
        self._options = options
        self._engine = engine
        self._say = say
        self._next_look = self._next_progress = 0.0
        self._versions: dict[Path, Version] = {}
        self._is_settled = False
        self._warnings: set[str] = set()
        states = _read_states(options.path)
        self._states = {path: self._take_over(state) for path, state in states.items()}
        self._written = {p: state for p, state in self._states.items() if not state.is_open}

    def __enter__(self) -> Inbox:
        return self

    def __exit__(self, *_: object) -> None:
        reason = "the run was interrupted; it goes on with --resume"
        for path, state in self._states.items():
            if state.job in self._engine.jobs:
                self._states[path] = replace(self._news(state), state="queued", reason=reason)
        self._write_states(with_progress=True)

    def between_steps(self, engine: Lead) -> None:
        """Look for files if it is time, and wait for some when no job trains."""
        if time.monotonic() >= self._next_look:
            self.look()
        while not (engine.jobs or engine.is_interrupted or self._is_over):
            engine.save_if_due(may_wait=True)
            time.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Take in new and deleted files, and write what has changed."""
        now = time.monotonic()
        self._next_look = now + LOOK_S
        try:
            versions = _job_files(self._options.path, self._versions)
            if self._states.keys() - versions.keys():  # editors rename a file and write it anew
                time.sleep(LOOK_S / 2)
                versions = _job_files(self._options.path, self._versions)
        except OSError as error:  # none was deleted then
            self._warn_once(f"{self._options.path} can't be read, jobs go on: {error}")
            return
        for path in self._states.keys() - versions.keys():
            self._forget(path)
        for path, version in versions.items():
            self._states[path] = self._follow(path, is_stable=self._versions.get(path) == version)
        self._is_settled, self._versions = versions == self._versions, versions
        self._write_states(with_progress=now >= self._next_progress)
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_S

    @property
    def _is_over(self) -> bool:
        """Whether to end the run: every file is dealt with, and nobody waits for more."""
        is_idle = not any(state.is_open for state in self._states.values())
        return self._options.exit_when_idle and is_idle and self._is_settled

    def _take_over(self, state: FileState) -> FileState:
        """Go on from a state file; what was to come and is not in the engine waits again.

        What is done by an earlier run has nothing to do with a job of this one, whatever its name.
        """
        if state.job in self._engine.joined:
            return state
        if state.is_open:
            return FileState(state.file, queued_at=state.queued_at)
        return replace(state, job=None)

    def _follow(self, path: Path, *, is_stable: bool) -> FileState:
        """Bring a file one step further."""
        state = self._states.get(path)
        if state is None:
            return FileState(path.name, queued_at=_now())
        if state.job is not None and (state.job in self._engine.jobs or state.is_open):
            return self._news(state)
        if is_stable and state.state == "queued":
            return self._submit(path, state)
        if is_stable and _hash(path) not in (state.sha256, None):
            return FileState(path.name, queued_at=_now())
        return state

    def _submit(self, path: Path, state: FileState) -> FileState:
        """Let a file's job join; whatever is wrong with it is told in its state."""
        state = replace(state, sha256=_hash(path))
        try:
            config = load_job_config(path)
            if config.name in self._engine.jobs or config.name in self._engine.results:
                raise ConfigError(f"job name must be new in this run, got {config.name!r} again")
            job = self._engine.build(config, reads_data=True)
            self._engine.add(job, overwrite=self._options.overwrite)
        except Exception as error:
            reason = str(error)
            if not isinstance(error, LoraloomError):
                reason = f"{type(error).__name__}: {shown(reason)}"
                _log.error("%s failed", path, exc_info=error)
            self._say(f"{path}: failed: {reason}")
            return replace(state, state="failed", reason=reason, ended_at=_now())
        self._say(f"{path}: job {config.name} joins")
        return self._news(replace(state, job=config.name, started_at=_now()))

    def _news(self, state: FileState) -> FileState:
        """Say how a job that the engine knows gets on."""
        assert state.job is not None
        job = self._engine.jobs.get(state.job)
        if job is None:
            ended = _ended(self._engine.results[state.job], state)
            return replace(ended, sha256=_hash(self._options.path / state.file))
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
        self._written.pop(path, None)
        if state.job in self._engine.jobs:
            result = self._engine.stop(state.job, f"its file {path} was deleted")
            self._write(path, _ended(result, state))
        elif state.state == "queued":
            with suppress(OSError):
                _state_file(path).unlink(missing_ok=True)

    def _write_states(self, *, with_progress: bool) -> None:
        """Write the state files that changed; a job's progress only now and then."""
        for path, state in self._states.items():
            written = self._written.get(path)
            is_progress = written is not None and written.state == state.state
            if state != written and (with_progress or not is_progress):
                self._write(path, state)

    def _write(self, path: Path, state: FileState) -> None:
        try:
            write_json(_state_file(path), asdict(state) | {"updated_at": _now()})
            self._written[path] = state
        except OSError as error:
            self._warn_once(f"{path} has a state file that can't be written: {error}")

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warnings:
            self._say(f"warning: {warning}")
        self._warnings.add(warning)


@contextmanager
def sole_trainer(path: Path) -> Iterator[None]:
    """Make a directory to watch if it isn't there, and keep other trainers away from it.

    They are kept away until the end or our death.
    """
    lock = FileLock(path / _LOCK_FILE, timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        next(path.iterdir(), None)  # raises where it can't be read
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"--watch must name a directory that no other run watches, {path} is watched by "
            "another; wait for its end, stop it, or name another directory"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--watch must name a directory that can be read and written to, got {path}: {error}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _ended(result: JobResult, state: FileState) -> FileState:
    is_done, reason = result.status in ("finished", "stopped early"), None
    if result.status == "stopped early":
        reason = "its metric no longer got better"
    return replace(
        state,
        state="done" if is_done else result.status,
        reason=result.error or result.stop_reason or reason,
        step=result.steps,
        ended_at=_now(),
        result=result.directory,
    )


def _job_files(directory: Path, known: Mapping[Path, Version]) -> dict[Path, Version]:
    """The job files with their versions; one that can't be looked at now is as it was before."""
    files = {}
    for path in sorted(directory.iterdir()):  # glob is silent about what it can't read
        if path.suffix != ".yaml" or path.name.startswith("."):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # deleted just now, or a link to nothing
            continue
        except OSError:
            files[path] = known.get(path, _UNSEEN)
            continue
        if stat.S_ISREG(status.st_mode):
            files[path] = (status.st_mtime_ns, status.st_size)
    return files


_FILE_STATE = TypeAdapter(FileState)


def _read_states(directory: Path) -> dict[Path, FileState]:
    """The state files that an earlier run left; one that can't be read counts for nothing."""
    states = {}
    for file in sorted(directory.glob("*.state.json")):
        try:
            values = read_json(file)
            values.pop("updated_at")
            state = _FILE_STATE.validate_python(values)
            path = directory / state.file
            if _state_file(path) == file:
                states[path] = state
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
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
