"""The files of a run: each job's results, and the checkpoints that --resume goes on from.

    <output_dir>/<job>/                     the adapter's files, metrics.jsonl, result.json
    <output_dir>/<job>/checkpoints/         `last` and `best`: the adapter at its end, and its best
    <output_dir>/.checkpoints/              checkpoints of all jobs at one moment
    <output_dir>/.checkpoints/jobs/<job>/   the same where several workers train, for each job apart
    <output_dir>/sweep.csv, .journal        the jobs of a sweep, compared; Optuna's record of them

    snapshot-000007/manifest.json    settings, metrics and result of each job; the files' checksums
    snapshot-000007/<job>.pt         tensors and plain values: weights, optimizer, half-done step

A checkpoint appears at once, by a rename; a damaged one is passed over. Randomness needs no record:
it is a function of seed, epoch and sample. No job can be called .checkpoints: see `check_name`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import ConfigDict, TypeAdapter, ValidationError

from loraloom.adapters import parse_adapter_config
from loraloom.atomic_io import cut_torn_line, remove, remove_leftovers, write_directory, write_json
from loraloom.config.fields import check_name
from loraloom.config.run_files import METRICS_FILE, RESULT_FILE, SWEEP_TABLE
from loraloom.config.text import read_json
from loraloom.data.sources import sha256
from loraloom.errors import ConfigError, TrainingError, plain
from loraloom.formats.files import model_card, write_adapter
from loraloom.formats.raw_files import CONFIG_FILE, SAVED_FILES
from loraloom.host.host import Host
from loraloom.training.job import Job, JobResult
from loraloom.training.settings import BASE_REFERENCE, DpoConfig, JobConfig, OptimizerConfig

MANIFEST = "manifest.json"
TENSORBOARD_DIRECTORY = "tensorboard"
_NUMBERED = re.compile(r"snapshot-([0-9]{1,18})")
_JOB_ENTRIES = (
    *SAVED_FILES,
    *(METRICS_FILE, RESULT_FILE, "checkpoints", TENSORBOARD_DIRECTORY, "wandb"),
)
# Older versions noted more of a job.
_CHECKED = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class JobRecord:
    """What a checkpoint's manifest says of a job."""

    settings: dict[str, Any]  # its section of the run file, all defaults filled in
    metrics_bytes: int = 0  # length of its metrics.jsonl at that moment
    sha256: str | None = None  # of its file; None before the first step and after the end
    joined_later: bool = False  # it is none of the run file's
    inputs: dict[str, str] = field(default_factory=dict)  # see `JobBuilder.input_digests`
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
    files: dict[str, Path] = field(default_factory=dict)  # of the jobs, where it was read
    __pydantic_config__ = _CHECKED

    @property
    def done(self) -> set[str]:
        return {name for name, record in self.jobs.items() if record.result is not None}

    def load_state(self, job: str) -> dict[str, Any] | None:
        if self.jobs[job].sha256 is None:
            return None
        return torch.load(self.files[job], weights_only=True, map_location="cpu")


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
            del body["files"]
            for name, state in states.items():
                torch.save(state, aside / f"{name}.pt")
                body["jobs"][name]["sha256"] = sha256(aside / f"{name}.pt")
            manifest = {"checksum": _json_hash(body), **body}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

        try:
            number = max(self._numbered(), default=0) + 1
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
        return [path for _, path in sorted(self._numbered().items(), reverse=True)]

    def _numbered(self) -> dict[int, Path]:
        # What is called otherwise, a backup say, is left alone.
        names = [(_NUMBERED.fullmatch(path.name), path) for path in self.directory.glob("*/")]
        return {int(name[1]): path for name, path in names if name is not None}


def _read(directory: Path) -> Checkpoint:
    body = read_json(directory / MANIFEST)
    if not isinstance(body, dict) or body.pop("checksum", None) != _json_hash(body):
        raise ValueError(f"{MANIFEST} was changed")
    checkpoint = _CHECKPOINT.validate_python({**body, "files": {}})
    files = {name: directory / f"{check_name(name)}.pt" for name in checkpoint.jobs}
    for name, record in checkpoint.jobs.items():
        if record.sha256 is not None and sha256(files[name]) != record.sha256:
            raise ValueError(f"{name}.pt was changed or is not whole")
    return replace(checkpoint, files=files)


def _json_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def describe_base(host: Host, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a base model; its fingerprint has the form of a saved description of it."""
    fingerprint, recorded = host.base.fingerprint, (saved or {}).get("fingerprint")
    return {
        "name": host.base.name_or_path,
        "fingerprint": recorded if host.base.has_fingerprint(recorded) else fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "quantization": host.base.quantization,
    }


def check_same_run(checkpoint: Checkpoint, jobs: Sequence[JobConfig], base: dict[str, Any]) -> None:
    changed = describe_changes({name: checkpoint.base.get(name) for name in base}, base, "base")
    for job in jobs:
        if job.name in checkpoint.jobs:
            saved = as_of_now(checkpoint.jobs[job.name].settings)
            # It changes no job's result.
            now = job.model_dump(mode="json") | {"priority": saved.get("priority")}
            changed += [f"job {job.name}: {change}" for change in describe_changes(saved, now)]
    if changed:
        raise ConfigError(
            "--resume requires the settings of the interrupted run, but these differ: "
            f"{'; '.join(changed)}; restore the settings, or pass --overwrite to start again"
        )


def as_of_now(settings: dict[str, Any]) -> dict[str, Any]:
    """What is now made of a job's or client's settings that an older version saved."""
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
    return [
        change
        for key in sorted(old.keys() | new.keys())
        for change in describe_changes(old.get(key), new.get(key), f"{path}.{key}".strip("."))
    ]


class RunDirectory:
    """Where a run's results go; with `by_job`, each job has checkpoints of its own."""

    def __init__(self, path: Path, *, by_job: bool = False):
        self.path = path
        self.by_job = by_job
        self.checkpoints = CheckpointStore(path / ".checkpoints")
        self.sweep_table = path / SWEEP_TABLE
        self.sweep_journal = path / "sweep.journal"
        self.sweep_lock = self.checkpoints.directory / "sweep.lock"
        self._by_job = self.checkpoints.directory / "jobs"
        self._lock_file = self.checkpoints.directory / ".lock"
        self._done: set[str] = set()  # with `by_job`, those whose last checkpoint is written

    def job(self, name: str) -> Path:
        return self.path / name

    def best(self, name: str) -> Path:
        return self.path / name / "checkpoints" / "best"

    def metrics(self, name: str) -> Path:
        return self.path / name / METRICS_FILE

    def has_checkpoints(self, *, by_job: bool) -> bool:
        return any(self._by_job.glob("*/")) if by_job else bool(self.checkpoints.newest_first())

    def newest_checkpoint(self, jobs: Sequence[str]) -> tuple[Checkpoint | None, list[str]]:
        if not self.by_job:
            return self.checkpoints.newest()
        read = {name: CheckpointStore(self._by_job / name).newest() for name in jobs}
        faults = [fault for _, own_faults in read.values() for fault in own_faults]
        found = {name: one for name, (one, _) in read.items() if one and name in one.jobs}
        if not found:
            return None, faults
        latest = max(found.values(), key=lambda checkpoint: checkpoint.seconds)
        records = {name: checkpoint.jobs[name] for name, checkpoint in found.items()}
        files = {name: checkpoint.files[name] for name, checkpoint in found.items()}
        return replace(latest, jobs=records, files=files), faults

    def write_checkpoint(
        self, checkpoint: Checkpoint, states: Mapping[str, dict[str, Any]], *, keep: int
    ) -> None:
        """Write a checkpoint, or one of each job, but none of one that was done before."""
        if not self.by_job:
            self.checkpoints.write(checkpoint, states, keep=keep)
            return
        for name in [name for name in checkpoint.jobs if name not in self._done]:
            alone = replace(checkpoint, jobs={name: checkpoint.jobs[name]})
            own = {name: states[name]} if name in states else {}
            CheckpointStore(self._by_job / name).write(alone, own, keep=1 if alone.done else keep)
            self._done |= alone.done

    def check(self, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; pass only one option")
        with self._writing():
            entries = sorted(os.listdir(self.path)) if self.path.exists() else []
        has = [self.has_checkpoints(by_job=by_job) for by_job in (False, True)]
        # A lock, or a checkpoint on its way when its writer was killed, is no result.
        if overwrite or not (any(has) or {*entries} - {".checkpoints"}):
            return
        if not resume:
            raise ConfigError(
                f"output_dir must be new or empty, got {self.path}, which has "
                f"{', '.join(entries[:3])}; pass --resume to continue the run, --overwrite "
                "to replace the jobs' results, or choose another directory"
            )
        if not has[self.by_job]:
            raise ConfigError(
                f"--resume requires checkpoints of a run {'with' if self.by_job else 'without'} "
                f"--ray, got none in {self.path}; use --ray as in that run, choose another "
                "output_dir, or pass --overwrite"
            )

    def check_sources(self, jobs: Sequence[JobConfig], others: Iterable[str] = ()) -> None:
        names = {*others, *(job.name for job in jobs)}
        jobs_by_path = {self.job(name).resolve(): name for name in names}
        for job in jobs:
            objective = job.train.objective
            start = job.start_from
            starts = [start] if isinstance(start, str) else start or ()
            sources = [("start_from", source) for source in starts]
            experts = job.adapter.sources.values()
            sources += [("adapter.experts", str(self.job(n)) if n in names else n) for n in experts]
            if isinstance(objective, DpoConfig) and objective.reference != BASE_REFERENCE:
                sources.append(("train.objective.reference", objective.reference))
            for setting, source in sources:
                path = Path(os.path.expanduser(source)).resolve()
                for replaced in (path, *path.parents):
                    if replaced in jobs_by_path:
                        raise ConfigError(
                            f"job {job.name}: {setting} must not be in what the run writes, got "
                            f"{source}, where job {jobs_by_path[replaced]} goes; choose another "
                            "output_dir or name"
                        )

    @contextmanager
    def opened(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Keep other runs out; of a run that ends before it writes, no directory is left."""
        aside, lock = self.checkpoints.directory, FileLock(self._lock_file, timeout=0)
        is_new = not self.path.exists()
        with self._writing():
            aside.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                raise ConfigError(
                    f"output_dir must not be in use by another run, got {self.path}; wait for that "
                    "run, stop that run, or choose another directory"
                ) from error
        try:
            self.check(resume=resume, overwrite=overwrite)
            for directory in (self.path, aside, *self._by_job.glob("*/")):
                remove_leftovers(directory)
            yield
        finally:
            # Before the release: afterwards, the lock in there may be another run's.
            with suppress(OSError):  # it has something else, or was deleted
                if [*aside.iterdir()] == [self._lock_file]:
                    remove(aside)
                    if is_new:
                        self.path.rmdir()
            lock.release()

    def prepare(self, jobs: Sequence[str]) -> None:
        # Checkpoints first: --resume must not go on from some whose results are gone.
        sweep = (self.sweep_table, self.sweep_journal)
        entries = [*self.checkpoints.newest_first(), self._by_job, *sweep]
        self._clear([*map(self.job, jobs)], entries)

    def prepare_job(self, name: str, *, overwrite: bool = False) -> None:
        """Make room for a job that begins; what a run that died left of it is deleted."""
        kept = (RESULT_FILE, *SAVED_FILES, f"checkpoints/best/{CONFIG_FILE}")
        for file in () if overwrite else kept:
            if (self.job(name) / file).exists():
                raise ConfigError(
                    f"job {name} must be new in {self.path}, but there is "
                    f"{self.job(name) / file}; choose another name, or move that directory away"
                )
        self._clear([self.job(name)])

    def _clear(self, jobs: Sequence[Path], others: Sequence[Path] = ()) -> None:
        with self._writing():
            for entry in (*others, *(job / entry for job in jobs for entry in _JOB_ENTRIES)):
                remove(entry)
            for job in jobs:
                remove_leftovers(job)

    def reopen(self, host: Host, job: Job, metrics_bytes: int) -> None:
        # A killed run may have got further: with better weights, or to the job's end.
        name = job.name
        with self._writing():
            for directory in (self.job(name), *self.job(name).glob("checkpoints/*/")):
                remove_leftovers(directory)
            remove(self.job(name) / RESULT_FILE)
            cut_torn_line(self.metrics(name), metrics_bytes)
            if job.selection.step is None:
                remove(self.best(name))
                return
        self.write_best(host, job)

    def write_best(self, host: Host, job: Job) -> None:
        assert job.best is not None, "an evaluation has chosen some"
        _write_adapter(self.best(job.name), host, job, job.best)

    def write_job(self, host: Host, job: Job, result: JobResult) -> None:
        last, best = job.adapter.tensors(), job.best
        with self._writing():
            if best is not None:
                # Again: what is there may be half of it.
                self.write_best(host, job)
            _write_adapter(self.best(job.name).with_name("last"), host, job, last)
            card = _model_card(result, host, job)
            _write_adapter(self.job(job.name), host, job, last if best is None else best, card)
            write_json(self.job(job.name) / RESULT_FILE, asdict(result))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"output_dir must be writable, got {self.path}: {error}; choose another directory"
            ) from error


def _write_adapter(
    path: Path, host: Host, job: Job, tensors: dict[str, Any], card: str | None = None
) -> None:
    config, prompt = job.adapter.config, job.adapter.prompt
    write_adapter(path, config, tensors, host.base, card, prompt=prompt, overwrite=True)


def _model_card(result: JobResult, host: Host, job: Job) -> str:
    which = f"{result.weights} weights of {result.steps} steps"
    if result.best is not None:
        which += f", chosen by {result.best['metric']} after step {result.best['step']}"
    training = f"{result.epochs:g} epochs, {result.tokens:,} tokens, seed {job.config.seed}"
    lines = [f"The {which} ({training})."]
    if result.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in result.metrics.items()]
    data = "\n".join(f"- {line}" for line in result.data)
    config, prompt = job.adapter.config, job.adapter.prompt
    results = "\n".join(lines)
    return model_card(config, host.base, name=result.job, data=data, results=results, prompt=prompt)
