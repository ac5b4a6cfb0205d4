"""A directory of job files: what is dropped into it is trained, and each file is told how it went.

    DIR/math.yaml          one job, as in `jobs:` of a run file
    DIR/math.state.json    written beside it: running, done, failed or stopped, and why

A file is read once it has not changed between two looks. One that was dealt with is read again when
it is edited; edits have no effect on a job that trains. Deleting the file of a job that trains
stops the job.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from filelock import BaseFileLock, FileLock

from loraloom.atomic_io import write_json
from loraloom.config.text import read_json
from loraloom.errors import ConfigError, LoraloomError, shown
from loraloom.training.engine import Engine
from loraloom.training.job import JobResult
from loraloom.training.settings import load_job_config

LOOK_S = 1.0
# When a file was changed, and its size.
_Version = tuple[int, int]


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
        self._next_look = 0.0
        self._jobs: dict[Path, str] = {}  # the jobs that train, by their files
        self._read: dict[Path, _Version] = {}  # files that were dealt with, as they were then
        self._files: dict[Path, _Version] = {}  # as the last look found them
        self._is_settled = False
        files = self._list_files()
        for state_file in sorted(self._options.path.glob("*.state.json")):
            self._take_up(state_file, files)

    def between_steps(self, engine: Engine) -> None:
        if time.monotonic() >= self._next_look:
            self.look()
        while not (engine.jobs or engine.interruption.requested):
            is_read = self._files.items() <= self._read.items()
            if self._options.exit_when_idle and self._is_settled and is_read:
                break
            engine.save_if_due()
            time.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        self._next_look = time.monotonic() + LOOK_S
        try:
            files = self._list_files()
        except OSError:  # away for a while: no file was deleted then
            return
        before, self._files = self._files, files
        self._is_settled = before == files
        for path, name in list(self._jobs.items()):
            # Some editors rename a file and write it again: it is gone when two looks miss it.
            if name in self._engine.jobs and path not in files and path not in before:
                self._engine.stop(name, f"its file {path} was deleted")
            if (result := self._engine.results.get(name)) is None:
                continue
            del self._jobs[path]
            state = "done" if result.status in ("finished", "stopped early") else result.status
            self._write(path, state, name, result.error or result.stop_reason, result)
            if path in files:  # what was edited while it trained has no effect
                self._read[path] = files[path]
        for path, version in files.items():
            if path in self._jobs or self._read.get(path) == version:
                continue
            if before.get(path) == version:
                self._read[path] = version
                self._submit(path)

    def _list_files(self) -> dict[Path, _Version]:
        paths = sorted(self._options.path.iterdir())  # glob is silent about what it can't read
        files = {}
        for path in paths:
            if path.suffix == ".yaml" and path.name[0] != "." and path.is_file():
                stat = path.stat()
                files[path] = (stat.st_mtime_ns, stat.st_size)
        return files

    def _take_up(self, state_file: Path, files: dict[Path, _Version]) -> None:
        """Go on with a file of this run, and leave one alone that was dealt with before."""
        path = state_file.with_name(state_file.name.replace(".state.json", ".yaml"))
        version = files.get(path, (0, 0))
        try:
            state = read_json(state_file)
            if state["state"] in ("done", "failed", "stopped"):
                if version[0] <= state_file.stat().st_mtime_ns:  # else it was edited since
                    self._read[path] = version
            elif state["job"] in self._engine.joined:
                self._jobs[path] = state["job"]
        except (LoraloomError, TypeError, KeyError):  # what is no state counts for nothing
            pass

    def _submit(self, path: Path) -> None:
        try:
            config = load_job_config(path)
            if config.name in self._engine.jobs:
                raise ConfigError(f"job name must be new in this run, got {config.name!r} again")
            self._engine.add(self._engine.builder.build(config), overwrite=self._options.overwrite)
        except Exception as error:
            is_ours = isinstance(error, LoraloomError)
            reason = str(error) if is_ours else f"{type(error).__name__}: {shown(str(error))}"
            self._say(f"{path}: failed: {reason}")
            self._write(path, "failed", None, reason, None)
        else:
            self._say(f"{path}: job {config.name} joins")
            self._jobs[path] = config.name
            self._write(path, "running", config.name, None, None)

    def _write(
        self, path: Path, state: str, job: str | None, reason: str | None, end: JobResult | None
    ) -> None:
        training = self._engine.jobs.get(job or "")
        step = end.steps if end else training.position.step if training else 0
        values = {"state": state, "job": job, "reason": reason, "step": step}
        values["result"] = None if end is None else end.directory
        try:
            write_json(path.with_name(f"{path.stem}.state.json"), values)
        except OSError as error:
            self._say(f"warning: {path} has a state file that cannot be written: {error}")


def lock_watched(path: Path) -> AbstractContextManager[BaseFileLock]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FileLock(path / ".loraloom.lock", timeout=0).acquire()
    except OSError as error:  # a lock that another run has is one as well
        raise ConfigError(
            f"--watch must name a writable directory that no other run watches, got {path}: {error}"
        ) from None
