"""Checkpoints: the state of jobs or of a client at one moment, which appears at once or not at all.

    snapshot-000007/manifest.json    settings, metrics and result of each job; the files' checksums
    snapshot-000007/<job>.pt         tensors and plain values: weights, optimizer, half-done step

A checkpoint appears by a rename; a damaged one is passed over. Randomness needs no record: it is a
function of seed, epoch and sample.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from loraloom.adapters import parse_adapter_config
from loraloom.atomic_io import remove, write_directory
from loraloom.config.fields import check_name
from loraloom.config.text import read_json
from loraloom.data.sources import sha256
from loraloom.errors import ConfigError, TrainingError, plain
from loraloom.host.host import Host
from loraloom.training.job import JobResult
from loraloom.training.settings import JobConfig, OptimizerConfig

MANIFEST = "manifest.json"
# Older versions noted more of a job.
_CHECKED = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class JobRecord:
    """What a checkpoint's manifest says of a job."""

    settings: dict[str, Any]  # its section of the run file, all defaults filled in
    metrics_bytes: int = 0  # length of its metrics.jsonl at that moment
    sha256: str | None = None  # of its file; None before the first step and after the end
    joined_later: bool = False  # it is none of the run file's
    inputs: dict[str, str] = field(default_factory=dict)  # digests of what the job reads
    result: JobResult | None = None  # None while it trains
    __pydantic_config__ = _CHECKED


@dataclass(frozen=True)
class Checkpoint:
    """A run at one moment."""

    round: int  # fused steps until then
    seconds: float  # wall time of the training until then
    base: dict[str, Any]  # see `describe_base`
    jobs: dict[str, JobRecord] = field(default_factory=dict)
    sweep_bytes: int = 0  # length of a sweep's journal
    max_tokens: int | None = None  # of a forward, where memory ran out; see `RoundRunner`
    max_alone: int | None = None
    directory: Path | None = None  # where it was read
    __pydantic_config__ = _CHECKED

    def load_state(self, job: str) -> dict[str, Any] | None:
        if self.jobs[job].sha256 is None or self.directory is None:
            return None
        return torch.load(self.directory / f"{job}.pt", weights_only=True, map_location="cpu")


_CHECKPOINT = TypeAdapter(Checkpoint)


@dataclass(frozen=True)
class CheckpointStore:
    """A directory of checkpoints."""

    directory: Path

    def write(
        self, checkpoint: Checkpoint, states: Mapping[str, dict[str, Any]], *, keep: int = 2
    ) -> None:
        def fill(aside: Path) -> None:
            body = asdict(checkpoint)
            del body["directory"]
            for name, state in states.items():
                torch.save(state, aside / f"{name}.pt")
                body["jobs"][name]["sha256"] = sha256(aside / f"{name}.pt")
            manifest = {"checksum": _json_hash(body), **body}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

        try:
            number = max(map(_number_of, self.newest_first()), default=0) + 1
            write_directory(self.directory / f"snapshot-{number:06}", fill)
        except (OSError, RuntimeError) as error:
            # On a full disk, torch.save raises a RuntimeError.
            raise TrainingError(
                f"a checkpoint cannot be written to {self.directory}: {error}; free disk space. "
                "--resume and load_state can use the previous checkpoint"
            ) from error
        for old in self.newest_first()[keep:]:
            with suppress(OSError):  # it is tried again after the next one
                remove(old)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        faults: list[str] = []
        for directory in self.newest_first():
            try:
                return _read(directory), faults
            except (OSError, ValueError) as error:
                reason = plain(str(error).partition("\n")[0])
                faults.append(f"checkpoint {directory} is damaged ({reason}); skipped")
        return None, faults

    def newest_first(self) -> list[Path]:
        # What is called otherwise, a backup say, is left alone.
        paths = [path for path in self.directory.glob("snapshot-*/") if _number_of(path)]
        return sorted(paths, key=_number_of, reverse=True)


def _number_of(checkpoint: Path) -> int:
    digits = checkpoint.name.removeprefix("snapshot-")
    return int(digits) if digits.isdecimal() else 0


def _read(directory: Path) -> Checkpoint:
    body = read_json(directory / MANIFEST)
    if not isinstance(body, dict) or body.pop("checksum", None) != _json_hash(body):
        raise ValueError(f"{MANIFEST} was changed")
    checkpoint = _CHECKPOINT.validate_python({**body, "directory": directory})
    for name, record in checkpoint.jobs.items():
        path = directory / f"{check_name(name)}.pt"
        if record.sha256 is not None and sha256(path) != record.sha256:
            raise ValueError(f"{name}.pt was changed or is not whole")
    return checkpoint


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe_base(host: Host, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a base model; its fingerprint has the form of a saved description of it."""
    fingerprint = (saved or {}).get("fingerprint")
    if not host.base.has_fingerprint(fingerprint):
        fingerprint = host.base.fingerprint
    return {
        "name": host.base.name_or_path,
        "fingerprint": fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "quantization": host.base.quantization,
    }


def check_same_run(checkpoint: Checkpoint, jobs: Sequence[JobConfig], base: dict[str, Any]) -> None:
    changed = describe_changes({name: checkpoint.base.get(name) for name in base}, base, "base")
    for job in jobs:
        if job.name in checkpoint.jobs:
            saved = _decisive_settings(as_of_now(checkpoint.jobs[job.name].settings))
            now = _decisive_settings(job.model_dump(mode="json"))
            changed += [f"job {job.name}: {change}" for change in describe_changes(saved, now)]
    if changed:
        raise ConfigError(
            "--resume requires the settings of the interrupted run, but these differ: "
            f"{'; '.join(changed)}; restore the settings, or pass --overwrite to start again"
        )


def _decisive_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings of a job that its results don't depend on."""
    settings = {name: value for name, value in settings.items() if name != "priority"}
    train = {k: v for k, v in settings.get("train", {}).items() if k != "save_total_limit"}
    return {**settings, "train": train}


def as_of_now(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a job's or client's settings as this version saves those of an older one."""
    try:
        if "optimizer" not in settings:
            return JobConfig.model_validate(settings).model_dump(mode="json")
        adapter = parse_adapter_config(settings["adapter"]).model_dump(mode="json")
        optimizer = OptimizerConfig(**settings["optimizer"]).model_dump(mode="json")
        return {**settings, "adapter": adapter, "optimizer": optimizer}
    except ValidationError:
        return settings


def describe_changes(old: Any, new: Any, path: str = "") -> list[str]:
    """Say where settings differ, as `train.seed was 0 and is 1`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path} was {old!r} and is {new!r}"]
    changes = []
    for key in sorted(old.keys() | new.keys()):
        changes += describe_changes(old.get(key), new.get(key), f"{path}.{key}".strip("."))
    return changes
