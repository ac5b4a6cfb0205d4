"""Let one file operation of a training run fail, or kill the run there, and see how it ends.

    scripts/faults [--moments 200] [--kills 20] [--seed 0] [--arrivals]

Four jobs (a LoRA, a DoRA, a MixLoRA and a MixDoRA) train on a tiny base model in float32, with an
evaluation every second step and a snapshot after every step. At a random one of the run's file
operations there is no space, an error of the device, no permission, or half of the bytes are
written; the run must end with the right weights or a clear error. Others are killed there. Then
each is resumed, and weights, best weights and metrics must be those of an unbroken run, bit by bit.

With --arrivals two of the jobs are a sweep's, and two come from a watched directory of job files.
One that a fault keeps from joining is told so in its state file, and is given again. Where a fault
puts the joining off, rows have other neighbours, and weights are equal up to rounding.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import loraloom
import loraloom.formats.disk as disk
from benchmarks.kills import different_files, settings
from benchmarks.parallel import difference
from loraloom.errors import LoraloomError
from loraloom.training import inbox, sweep
from loraloom.training.inbox import WatchOptions
from loraloom.training.progress import Progress
from tests.fuzz.harness import assert_presentable
from tests.training.saved import save_inputs

FAULTS = ("ENOSPC", "EIO", "EPERM", "short write")
KILL = "kill"
STEPS = 6

_PATHS = "replace rename mkdir unlink rmdir truncate open listdir scandir".split()
"""Functions of os whose first argument is a path."""


@dataclass
class Moment:
    """A file operation of a run, where something happens.

    Args:
        directory: Operations on what is in it are counted.
        number: Of the operation, from 1 on; 0 for none.
        fault: What happens there.
        operations: What was done so far.
    """

    directory: Path
    number: int = 0
    fault: str = FAULTS[0]
    operations: list[str] = field(default_factory=list)

    def is_now(self, name: str, path: Any) -> bool:
        """Count an operation, and tell whether it is the one."""
        if isinstance(path, int) or not Path(os.fsdecode(path)).is_relative_to(self.directory):
            return False
        self.operations.append(f"{name} {Path(os.fsdecode(path)).relative_to(self.directory)}")
        return len(self.operations) == self.number

    def happen(self) -> None:
        """Fail, or die."""
        if self.fault == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.fault, errno.ENOSPC)
        raise OSError(number, os.strerror(number))


class _File:
    """A file whose writes are operations."""

    def __init__(self, file: Any, path: Any, moment: Moment):
        self._file, self._path, self._moment = file, path, moment

    def write(self, content: Any) -> int:
        """Write; at the moment, write a half."""
        if not self._moment.is_now("write", self._path):
            return self._file.write(content)
        if self._moment.fault in ("short write", KILL):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
        self._moment.happen()
        raise AssertionError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def moment_of(moment: Moment) -> Iterator[Moment]:
    """Count file operations, and let the moment come."""
    with ExitStack() as stack:
        for name in _PATHS:
            wrapped = _failing(getattr(os, name), name, moment)
            stack.enter_context(patch.object(os, name, wrapped))
        opened = _opening(io.open, moment)
        for module in (io, builtins):
            stack.enter_context(patch.object(module, "open", opened))
        stack.enter_context(patch.object(os, "fsync", _syncing(moment)))
        stack.enter_context(patch.object(torch, "save", _writing(torch.save, moment)))
        stack.enter_context(patch.object(disk, "save_file", _writing(disk.save_file, moment)))
        yield moment


def _failing(function: Callable[..., Any], name: str, moment: Moment) -> Callable[..., Any]:
    def wrapped(path: Any = ".", *args: Any, **options: Any) -> Any:
        if moment.is_now(name, path):
            moment.happen()
        return function(path, *args, **options)

    return wrapped


def _opening(function: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
    def wrapped(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if moment.is_now(f"open as {mode}", path):
            moment.happen()
        file = function(path, mode, *args, **options)
        return file if set(mode) <= set("rbt") else _File(file, path, moment)

    return wrapped


def _syncing(moment: Moment) -> Callable[[int], None]:
    """Stand in for fsync: nothing here loses its power."""

    def wrapped(descriptor: int) -> None:
        if moment.is_now("fsync", os.readlink(f"/proc/self/fd/{descriptor}")):
            moment.happen()

    return wrapped


def _writing(function: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
    """Let a writer that is not in Python fail half-way."""

    def wrapped(content: Any, path: Any, *args: Any, **options: Any) -> None:
        is_now = moment.is_now(function.__name__, path)
        function(content, path, *args, **options)
        if is_now:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            moment.happen()

    return wrapped


@dataclass
class Bench:
    """Runs four jobs again and again on one base model.

    Args:
        directory: For everything that is written.
        seed: Of the moments.
        arrivals: Let jobs be a sweep's, or come from files.
        outcomes: How runs ended, counted.
        defects: What should not have been, a line each.
    """

    directory: Path
    seed: int = 0
    arrivals: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self._inputs = save_inputs(self.directory)
        model, tokenizer = loraloom.load_base_model(str(self._inputs / "base"))
        self._base = loraloom.attach(model), tokenizer
        self._random = random.Random(self.seed)
        self._unbroken, self._broken = self.directory / "unbroken", self.directory / "broken"
        self._inbox("unbroken")
        with moment_of(Moment(self.directory)) as unbroken:
            self._names = [result.job for result in self._train("unbroken")]
        self.operations = unbroken.operations

    def try_fault(self) -> None:
        """Let a random operation fail, and resume what came of it."""
        moment = self._moment(self._random.choice(FAULTS))
        try:
            with moment_of(moment):
                results = self._train("broken")
        except LoraloomError as error:
            self._check_message(moment, str(error))
            ending = "a clear error"
        except Exception as error:
            self._defect(moment, f"{type(error).__name__}: {error}")
            ending = "another error"
        else:
            errors = [result.error for result in results if result.error is not None]
            for error in errors:
                self._check_message(moment, error)
            ending = "a job failed with a clear error" if errors else "all trained"
        self.outcomes[ending] += 1
        self._resume(moment)

    def try_kill(self) -> None:
        """Kill a run at a random operation among those that write results, and resume it."""
        moment = self._moment(KILL)
        process = multiprocessing.get_context("fork").Process(target=self._die, args=(moment,))
        process.start()
        process.join()
        self.outcomes["killed" if process.exitcode == -signal.SIGKILL else "not killed"] += 1
        self._resume(moment)

    def _die(self, moment: Moment) -> None:
        with moment_of(moment):
            self._train("broken")

    def _moment(self, fault: str) -> Moment:
        of_results = [n for n, text in enumerate(self.operations, 1) if " unbroken" in text]
        numbers = of_results if fault == KILL else range(1, len(self.operations) + 1)
        shutil.rmtree(self.directory / "broken", ignore_errors=True)
        self._inbox("broken")
        return Moment(self.directory, self._random.choice(numbers), fault)

    def _train(self, name: str, *, resume: bool = False) -> list[Any]:
        run, watch = self._settings(name), None
        if self.arrivals:
            _, job, *_ = run.pop("jobs")
            run["sweep"] = {"job": job, "parameters": {"seed": [1, 5]}}
            watch = WatchOptions(self.directory / f"{name} inbox", exit_when_idle=True)
        with patch.object(inbox, "LOOK_S", 0.0), patch.object(sweep, "plot_sweep"):
            return loraloom.train(
                run, resume=resume, base=self._base, progress=Progress(), watch=watch
            )

    def _settings(self, name: str) -> dict[str, Any]:
        return settings(self._inputs, self.directory / name, STEPS, eval_steps=2, save_steps=1)

    def _inbox(self, name: str) -> None:
        """Put two of the jobs into a new directory."""
        directory = self.directory / f"{name} inbox"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for job in self._settings(name)["jobs"][2:]:
            (directory / f"{job['name']}.yaml").write_text(json.dumps(job))

    def _give_again(self) -> None:
        """Forget what was told of job files that failed."""
        for file in (self.directory / "broken inbox").glob("*.state.json"):
            state = json.loads(file.read_text())
            if state["state"] == "failed":
                self.outcomes["a job file failed with a clear error"] += 1
                self._check_message(Moment(file), state["reason"])
                file.unlink()

    def _resume(self, moment: Moment) -> None:
        self._give_again()
        try:
            results = self._train("broken", resume=True)
        except Exception as error:
            self._defect(moment, f"resumed: {type(error).__name__}: {error}")
            return
        unfinished = [result.job for result in results if result.status != "finished"]
        if unfinished or {result.job for result in results} != set(self._names):
            self._defect(moment, f"resumed: not finished are {unfinished}")
            return
        different = [
            file
            for file in different_files(self._unbroken, self._broken, self._names)
            if moment.fault == KILL or not file.endswith("metrics.jsonl")
        ]
        if different and self._joined_later(moment):
            self.outcomes["a job joined later, its weights are equal up to rounding"] += 1
        elif different:
            self._defect(moment, f"resumed: {len(different)} are others, {different[0]} for one")
        for file in self.directory.glob("broken*/**/*.writing"):
            self._defect(moment, f"left behind: {file}")

    def _joined_later(self, moment: Moment) -> bool:
        """Whether all that differs is rounding: jobs of a later round have other neighbours."""
        places = [
            Path(name, place)
            for name in self._names
            for place in ("", "checkpoints/last", "checkpoints/best")
        ]
        is_delayed = self.arrivals and moment.fault != KILL
        return is_delayed and all(
            difference(self._broken / place, self._unbroken / place).is_rounding for place in places
        )

    def _check_message(self, moment: Moment, message: str) -> None:
        try:
            assert_presentable(message)
        except AssertionError as error:
            self._defect(moment, str(error))

    def _defect(self, moment: Moment, text: str) -> None:
        operation = moment.operations[moment.number - 1] if moment.operations else "?"
        self.defects.append(f"{moment.fault} at operation {moment.number} ({operation}): {text}")


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arrivals", action="store_true", help="a sweep, and files of jobs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), options.seed, options.arrivals)
        for _ in range(options.moments):
            bench.try_fault()
        for _ in range(options.kills):
            bench.try_kill()
    print(f"{len(bench.operations)} file operations a run")
    print("\n".join(f"{count:4} {ending}" for ending, count in bench.outcomes.most_common()))
    print("\n".join(bench.defects) or "after --resume all weights and metrics are bit-equal")
    raise SystemExit(1 if bench.defects else 0)


if __name__ == "__main__":
    main()
