"""Snapshots of a whole run: every job at one moment, so that a resumed run goes on as if unbroken.

    <output_dir>/.checkpoints/snapshot-000007/
        manifest.json    what each job's settings, metrics and result were, and the files' checksums
        <job>.pt         its weights, optimizer, schedule, half-done step: tensors and plain values

Where several workers train, each job has snapshots of its own, in .checkpoints/jobs/<job>/. A
snapshot appears at once, by a rename. The newest ones are kept; a damaged one is passed over.
Randomness needs no record: it is a function of seed, epoch and sample.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter

from loraloom.config.fields import check_name
from loraloom.config.text import read_json
from loraloom.durable import remove, write_directory
from loraloom.errors import TrainingError, plain

MANIFEST = "manifest.json"

STATE_ERRORS = (
    AttributeError,
    KeyError,
    OverflowError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
)
"""What a state that is of something else may raise where it is put to use."""

_SNAPSHOT = re.compile(r"snapshot-([0-9]{1,18})")
_CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class JobRecord:
    """What a snapshot's manifest says of a job.

    Args:
        settings: Its section of the run file, all defaults filled in.
        metrics_bytes: Length of its metrics.jsonl at that moment.
        sha256: Of its file; None where there is none, before the first step and after the end.
        joined_later: It is none of the run file's.
        inputs: Hashes of what it learns from and is measured on, see `input_digests`.
        scheduler_pass: Its place in the queue for steps; see `Schedule`.
        micro_batches: How many it had done at its end; 0 before.
        result: What became of it, once it is done; None while it trains.
    """

    settings: dict[str, Any]
    metrics_bytes: int = 0
    sha256: str | None = None
    joined_later: bool = False
    inputs: dict[str, str] = field(default_factory=dict)
    scheduler_pass: float = 0.0
    micro_batches: int = 0
    result: dict[str, Any] | None = None

    __pydantic_config__ = _CHECKED


@dataclass(frozen=True)
class Moment:
    """A whole run at one moment, without the jobs' states.

    Args:
        round: Fused steps until then.
        seconds: Wall time of the training until then.
        base: The base model and how it computed.
        jobs: By name.
        sweep_bytes: Length of a sweep's journal at that moment.
    """

    round: int
    seconds: float
    base: dict[str, Any]
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    sweep_bytes: int = 0

    __pydantic_config__ = _CHECKED


@dataclass(frozen=True, kw_only=True)
class Snapshot(Moment):
    """A moment that was written.

    Args:
        directory: Where it is.
    """

    directory: Path
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def done(self) -> set[str]:
        """Names of the jobs that no longer train."""
        return {name for name, record in self.jobs.items() if record.result is not None}

    def load_state(self, job: str) -> dict[str, Any] | None:
        """Read a job's state; None if it had none."""
        if self.jobs[job].sha256 is None:
            return None
        file = self.files.get(job, _state_file(self.directory, job))
        return torch.load(file, weights_only=True, map_location="cpu")


class SnapshotStore:
    """The snapshots of a run."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._damaged: set[Path] = set()

    def write(self, moment: Moment, states: Mapping[str, dict[str, Any]], *, keep: int = 2) -> None:
        """Write a snapshot, then delete old ones."""

        def fill(aside: Path) -> None:
            for name, state in states.items():
                torch.save(state, _state_file(aside, name))
            body = {part.name: getattr(moment, part.name) for part in fields(Moment)}
            body["jobs"] = {name: asdict(record) for name, record in moment.jobs.items()}
            for name in states:
                body["jobs"][name]["sha256"] = _file_hash(_state_file(aside, name))
            manifest = {"checksum": _json_hash(body), **body}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

        try:
            number = max(self._numbered(), default=0) + 1
            write_directory(self.directory / f"snapshot-{number:06}", fill)
        except (OSError, RuntimeError) as error:  # torch.save on a full disk: RuntimeError
            raise TrainingError(
                f"a checkpoint can't be written to {self.directory}: {error}"
            ) from error
        with suppress(OSError):
            whole = [path for path in self._directories() if path not in self._damaged]
            for old in (*whole[keep:], *self._damaged):
                remove(old)
            self._damaged.clear()

    def newest(self) -> tuple[Snapshot | None, list[str]]:
        """Find the newest snapshot that is whole."""
        faults: list[str] = []
        for directory in self._directories():
            try:
                return _read(directory), faults
            except (OSError, ValueError) as error:
                reason = plain(str(error).partition("\n")[0])
                self._damaged.add(directory)
                faults.append(f"checkpoint {directory} is damaged ({reason}); passing it over")
        return None, faults

    def exists(self) -> bool:
        """Whether there is any snapshot, whole or not."""
        return bool(self._directories())

    def clear(self) -> None:
        """Delete all snapshots."""
        for directory in self._directories():
            remove(directory)

    def _directories(self) -> list[Path]:
        """Find the snapshots, the newest first."""
        return [path for _, path in sorted(self._numbered().items(), reverse=True)]

    def _numbered(self) -> dict[int, Path]:
        """Find the snapshots by number; what is called otherwise, a backup say, is left alone."""
        names = [(_SNAPSHOT.fullmatch(path.name), path) for path in self.directory.glob("*/")]
        return {int(name[1]): path for name, path in names if name is not None}


class JobSnapshots:
    """Snapshots of jobs that several workers train: each job has a store of its own.

    So whoever trains a job finds its newest snapshot, whoever has written that.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._done: set[str] = set()

    def of(self, job: str) -> SnapshotStore:
        """The snapshots of a job."""
        return SnapshotStore(self.directory / job)

    def write(self, moment: Moment, states: Mapping[str, dict[str, Any]], *, keep: int = 2) -> None:
        """Write a snapshot of each job, but none of one that was done before."""
        for name in [name for name in moment.jobs if name not in self._done]:
            is_done = moment.jobs[name].result is not None
            own = {name: states[name]} if name in states else {}
            alone = replace(moment, jobs={name: moment.jobs[name]})
            self.of(name).write(alone, own, keep=1 if is_done else keep)
            if is_done:
                self._done.add(name)

    def newest(self, names: Iterable[str]) -> tuple[Snapshot | None, list[str]]:
        """Join the newest whole snapshots of some jobs; None where there are none."""
        found = {name: self.of(name).newest() for name in names}
        faults = [fault for _, own_faults in found.values() for fault in own_faults]
        snapshots = {
            name: snapshot
            for name, (snapshot, _) in found.items()
            if snapshot is not None and name in snapshot.jobs
        }
        if not snapshots:
            return None, faults
        latest = max(snapshots.values(), key=lambda snapshot: snapshot.seconds)
        jobs = {name: snapshot.jobs[name] for name, snapshot in snapshots.items()}
        files = {name: _state_file(one.directory, name) for name, one in snapshots.items()}
        return replace(latest, jobs=jobs, files=files), faults

    def exists(self) -> bool:
        """Whether there is any."""
        return any(self.directory.glob("*/"))

    def clear(self) -> None:
        """Delete all snapshots."""
        remove(self.directory)


def describe_changes(old: Any, new: Any, path: str = "") -> list[str]:
    """Tell where settings differ, as `train.seed was 0 and is 1`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        parts = [
            describe_changes(old.get(key), new.get(key), f"{path}.{key}".strip(".")) for key in keys
        ]
        return [change for part in parts for change in part]
    return [] if old == new else [f"{path} was {old!r} and is {new!r}"]


def _read(directory: Path) -> Snapshot:
    body = read_json(directory / MANIFEST)
    if not isinstance(body, dict) or body.pop("checksum", None) != _json_hash(body):
        raise ValueError(f"{MANIFEST} was changed")
    snapshot = _SNAPSHOT_TYPE.validate_python({**body, "directory": directory})
    for name, record in snapshot.jobs.items():
        file = _state_file(directory, check_name(name))
        if record.sha256 is not None and _file_hash(file) != record.sha256:
            raise ValueError(f"{file.name} was changed or is not whole")
    return snapshot


_SNAPSHOT_TYPE = TypeAdapter(Snapshot)


def _state_file(directory: Path, job: str) -> Path:
    return directory / f"{job}.pt"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
