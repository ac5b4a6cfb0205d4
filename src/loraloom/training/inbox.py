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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from loraloom.config.text import read_json
from loraloom.durable import write_json
from loraloom.errors import ConfigError, LoraloomError, shown
from loraloom.training.engine import Engine
from loraloom.training.results import JobResult
from loraloom.training.settings import load_job_config

LOOK_S = 1.0
PROGRESS_S = 5.0
_KEYS = ("file", "state", "job", "reason", "step", "total_steps", "loss")
_KEYS += ("queued_at", "started_at", "ended_at", "result", "sha256")
"""Of a state file, beside `updated_at`. `sha256` is of the job file's content as it was read."""

# States of files that something is still to come of.
_OPEN = ("queued", "running")

_log = logging.getLogger(__name__)


class WatchOptions(NamedTuple):
    """A directory to watch, whether to replace earlier results, and to end when all is done."""

    path: Path
    overwrite: bool = False
    exit_when_idle: bool = False


class Inbox:
    """Brings job files to an engine, and its news back beside them."""

    def __init__(self, options: WatchOptions, engine: Engine, say: Callable[[str], None]):
        self._options = options
        self._engine = engine
        self._say = say
        self._next_look = self._next_progress = 0.0
        self._hashes: dict[Path, str | None] = {}
        self._is_settled = False
        self._warnings: set[str] = set()
        self._states = dict(self._read_states())

    def between_steps(self, engine: Engine) -> None:
        """Look for files if it is time, and wait for some when no job trains."""
        if time.monotonic() >= self._next_look:
            self.look()
        while not (engine.jobs or engine.interruption.requested or self._is_over()):
            engine.save_if_due(may_wait=True)
            time.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Take in new, edited and deleted files, and write how jobs get on."""
        now = time.monotonic()
        self._next_look = now + LOOK_S
        try:
            hashes = _hash_files(self._options.path)
        except OSError as error:  # no file was deleted then
            return self._warn_once(f"{self._options.path} can't be read, jobs go on: {error}")
        before, self._hashes = self._hashes, hashes
        # A file that was edited a moment ago is not dealt with, whatever its last state says.
        self._is_settled = before == hashes
        # Some editors rename a file and write it again: it is gone when two looks have missed it.
        for path in self._states.keys() - hashes.keys() - before.keys():
            self._forget(path)
        if is_progress_due := now >= self._next_progress:
            self._next_progress = now + PROGRESS_S
        for path, content in hashes.items():
            state = self._states.get(path, {})
            if (name := state.get("job")) in self._engine.jobs:
                if is_progress_due or state["state"] != "running":
                    self._write(path, state="running", reason=None, **self._progress(name))
            elif name is not None and state["state"] in _OPEN:
                self._end(path, self._engine.results[name])
            elif not state:
                self._write(path, state="queued", queued_at=_now())
            elif before.get(path, "") != content:  # it is being written
                continue
            elif state["state"] == "queued" or content not in (state["sha256"], None):
                self._submit(path, content)

    def close(self) -> None:
        """Say of jobs that were interrupted that they wait."""
        reason = "the run was interrupted; it goes on with --resume"
        for path, state in self._states.items():
            if (name := state["job"]) in self._engine.jobs:
                self._write(path, state="queued", reason=reason, **self._progress(name))

    def _is_over(self) -> bool:
        """Whether every file is dealt with, and nobody waits for more."""
        is_idle = all(state["state"] not in _OPEN for state in self._states.values())
        return self._options.exit_when_idle and is_idle and self._is_settled

    def _read_states(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Read what earlier runs left: states of this run's jobs, and of files that are done.

        A file that waited or trained in another run waits again. What is done there has nothing to
        do with a job of this one, whatever its name.
        """
        for file in sorted(self._options.path.glob("*.state.json")):
            with suppress(OSError, ValueError, TypeError, AttributeError):  # it counts for nothing
                saved = read_json(file)
                state = {key: saved.get(key) for key in _KEYS}
                is_of_this_run = state["job"] in self._engine.joined
                if is_of_this_run or state["state"] in ("done", "failed", "stopped"):
                    state["job"] = state["job"] if is_of_this_run else None
                    yield file.with_name(file.name.replace(".state.json", ".yaml")), state

    def _submit(self, path: Path, content: str | None) -> None:
        """Let a file's job join; whatever is wrong with it is told in its state."""
        began: dict[str, Any] = {"queued_at": self._states[path]["queued_at"], "sha256": content}
        self._states[path] = dict.fromkeys(_KEYS) | {"file": path.name, "step": 0} | began
        try:
            config = load_job_config(path)
            if config.name in self._engine.jobs or config.name in self._engine.results:
                raise ConfigError(f"job name must be new in this run, got {config.name!r} again")
            self._engine.add(self._engine.builder.build(config), overwrite=self._options.overwrite)
        except Exception as error:
            reason = str(error)
            if not isinstance(error, LoraloomError):
                reason = f"{type(error).__name__}: {shown(reason)}"
                _log.error("%s failed", path, exc_info=error)
            self._say(f"{path}: failed: {reason}")
            self._write(path, state="failed", reason=reason, ended_at=_now())
        else:
            self._say(f"{path}: job {config.name} joins")
            progress = self._progress(config.name)
            self._write(path, state="running", job=config.name, started_at=_now(), **progress)

    def _progress(self, name: str) -> dict[str, Any]:
        job = self._engine.jobs[name]
        position = job.position
        return {"step": position.step, "total_steps": job.total_steps, "loss": position.last_loss}

    def _end(self, path: Path, result: JobResult) -> None:
        """Say what became of a job. What was edited while it trained has no effect."""
        state, reason = result.status, result.error or result.stop_reason
        if state == "stopped early":
            reason = "its metric no longer got better"
        self._write(
            path,
            state="done" if state in ("finished", "stopped early") else state,
            reason=reason,
            step=result.steps,
            ended_at=_now(),
            result=result.directory,
            sha256=self._hashes.get(path),
        )

    def _forget(self, path: Path) -> None:
        """Follow a file's deletion: its job is stopped, or no longer waits."""
        state = self._states[path]
        if state["job"] in self._engine.jobs:
            self._end(path, self._engine.stop(state["job"], f"its file {path} was deleted"))
        elif state["state"] == "queued":
            with suppress(OSError):
                _state_file(path).unlink(missing_ok=True)
        del self._states[path]

    def _write(self, path: Path, **changes: Any) -> None:
        """Change a file's state, and write it if that is new."""
        new = dict.fromkeys(_KEYS) | {"file": path.name, "step": 0}
        state = self._states.setdefault(path, new)
        if changes.items() <= state.items():
            return
        state |= changes
        try:
            write_json(_state_file(path), state | {"updated_at": _now()})
        except OSError as error:
            self._warn_once(f"{path} has a state file that can't be written: {error}")

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warnings:
            self._say(f"warning: {warning}")
        self._warnings.add(warning)


@contextmanager
def sole_trainer(path: Path) -> Iterator[None]:
    """Make a directory to watch if it isn't there, and keep other trainers away until the end."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        next(path.iterdir(), None)  # raises where it can't be read
        lock = FileLock(path / ".loraloom.lock", timeout=0).acquire()
    except Timeout:
        raise ConfigError(
            f"--watch must name a directory that no other run watches, {path} is watched by "
            "another; wait for its end, stop it, or name another directory"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--watch must name a directory that can be read and written to, got {path}: {error}"
        ) from error
    with lock:
        yield


def _hash_files(directory: Path) -> dict[Path, str | None]:
    """The job files with the hashes of their contents; None of one that can't be read."""
    hashes: dict[Path, str | None] = {}
    for path in sorted(directory.iterdir()):  # glob is silent about what it can't read
        if path.suffix == ".yaml" and not path.name.startswith(".") and path.is_file():
            hashes[path] = None
            with suppress(OSError):
                hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def _state_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.state.json")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
