"""The directory of a run: each job's results, and the checkpoints that --resume goes on from.

    <output_dir>/<job>/                        the adapter's files, metrics.jsonl, result.json
    <output_dir>/<job>/checkpoints/last/       the adapter at the job's end
    <output_dir>/<job>/checkpoint-<step>/      an intermediate adapter, the job's after that step
    <output_dir>/.checkpoints/                 checkpoints of all jobs at one moment
    <output_dir>/.checkpoints/worker-1-of-2/   those of a Ray worker's jobs
    <output_dir>/sweep.csv, .journal           a sweep's jobs, compared; Optuna's record of them

No job can be called .checkpoints: see `check_name`. Intermediate adapters are for users alone, who
may copy or delete them at any time: --resume reads none of them.
"""

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loraloom.adapters.routed.method import sources_of
from loraloom.atomic_io import (
    cut_torn_line,
    remove,
    remove_directory,
    remove_leftovers,
    write_directory,
    write_json,
)
from loraloom.config.run_files import METRICS_FILE, RESULT_FILE, SWEEP_TABLE
from loraloom.errors import ConfigError
from loraloom.formats.files import model_card, write_adapter
from loraloom.formats.raw_files import SAVED_FILES
from loraloom.host.host import Host
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.job import Job, JobResult
from loraloom.training.settings import BASE_REFERENCE, DpoConfig, JobConfig

TENSORBOARD_DIRECTORY = "tensorboard"
# As transformers' Trainer calls them: `checkpoint-200`.
_INTERMEDIATE = "checkpoint-"
_LOGS = (TENSORBOARD_DIRECTORY, "dvclive", "swanlab", "wandb")
_JOB_ENTRIES = (*SAVED_FILES, METRICS_FILE, RESULT_FILE, "checkpoints", *_LOGS)


class RunDirectory:
    """Where a run's results go, and checkpoints of all its jobs or of a Ray worker's."""

    def __init__(self, path: Path, *, with_ray: bool = False, worker: str = ""):
        self.path = path
        self.with_ray = with_ray
        self._aside = path / ".checkpoints"
        self.checkpoints = CheckpointStore(self._aside / worker)
        self.sweep_table = path / SWEEP_TABLE
        self.sweep_journal = path / "sweep.journal"
        self.sweep_lock = self._aside / "sweep.lock"
        self._lock_file = self._aside / ".lock"

    def job(self, name: str) -> Path:
        return self.path / name

    def metrics(self, name: str) -> Path:
        return self.path / name / METRICS_FILE

    def worker_directories(self) -> list[Path]:
        """List the directories of Ray workers that have a checkpoint."""
        return sorted({path.parent for path in self._aside.glob("worker-*/snapshot-*/")})

    def check(self, *, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other; pass only one option")
        with self._writing():
            entries = sorted(os.listdir(self.path)) if self.path.exists() else []
        forms = {False: self.checkpoints.newest_first(), True: self.worker_directories()}
        # A lock, or a checkpoint on its way when its writer was killed, is no result.
        has_results = any(forms.values()) or {*entries} - {".checkpoints"}
        if overwrite or not has_results:
            return
        if not resume:
            raise ConfigError(
                f"output_dir must be new or empty, got {self.path}, which has "
                f"{', '.join(entries[:3])}; pass --resume to continue the run, --overwrite "
                "to replace the jobs' results, or choose another directory"
            )
        if not forms[self.with_ray]:
            raise ConfigError(
                f"--resume requires checkpoints of a run {'with' if self.with_ray else 'without'} "
                f"--ray, got none in {self.path}; use --ray as in that run, choose another "
                "output_dir, or pass --overwrite"
            )

    def check_sources(self, jobs: Sequence[JobConfig], running: Iterable[str] = ()) -> None:
        names = {*running, *(job.name for job in jobs)}
        jobs_by_path = {self.job(name).resolve(): name for name in names}
        for job in jobs:
            for setting, source in self._sources(job, names):
                path = Path(os.path.expanduser(source)).resolve()
                for replaced in (path, *path.parents):
                    if replaced in jobs_by_path:
                        raise ConfigError(
                            f"job {job.name}: {setting} must not be in what the run writes, got "
                            f"{source}, where job {jobs_by_path[replaced]} goes; choose another "
                            "output_dir or name"
                        )

    def _sources(self, job: JobConfig, names: Container[str]) -> Iterator[tuple[str, str]]:
        """Yield the adapters that a job reads, each with the setting that names it."""
        if job.start_from is not None:
            yield "start_from", job.start_from
        for expert in sources_of(job.adapter).values():
            yield "adapter.experts", str(self.job(expert)) if expert in names else expert
        objective = job.train.objective
        if isinstance(objective, DpoConfig) and objective.reference != BASE_REFERENCE:
            yield "train.objective.reference", objective.reference

    @contextmanager
    def opened(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Keep other runs out; of a run that ends before it writes, no directory is left."""
        aside = self._aside
        lock = FileLock(self._lock_file, timeout=0)
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
            for directory in (self.path, aside, *aside.glob("worker-*/")):
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
        with self._writing():
            for path in (*self.checkpoints.newest_first(), *self._aside.glob("worker-*/")):
                remove(path)
            remove(self.sweep_table)
            remove(self.sweep_journal)
        for name in jobs:
            self._clear(name)

    def prepare_job(self, name: str, *, overwrite: bool = False) -> None:
        """Make room for a job that begins; what a run that died left of it is deleted."""
        files = [self.job(name) / file for file in (RESULT_FILE, *SAVED_FILES)]
        for path in (*files, *self.intermediate_adapters(name).values()):
            if path.exists() and not overwrite:
                raise ConfigError(
                    f"job {name} must be new in {self.path}, but there is {path}; choose another "
                    "name, or move that directory away"
                )
        self._clear(name)

    def _clear(self, name: str) -> None:
        with self._writing():
            for entry in _JOB_ENTRIES:
                remove(self.job(name) / entry)
            for path in self.intermediate_adapters(name).values():
                remove_directory(path)
            remove_leftovers(self.job(name))

    def reopen(self, name: str, metrics_bytes: int) -> None:
        # A killed run may have got further, even to the job's end.
        with self._writing():
            for directory in (self.job(name), *self.job(name).glob("checkpoints/*/")):
                remove_leftovers(directory)
            remove(self.job(name) / RESULT_FILE)
            cut_torn_line(self.metrics(name), metrics_bytes)

    def intermediate_adapters(self, name: str) -> dict[int, Path]:
        """List a job's intermediate adapters by their steps, the oldest first."""
        paths = {}
        for path in self.job(name).glob(f"{_INTERMEDIATE}*/"):
            digits = path.name.removeprefix(_INTERMEDIATE)
            if digits.isdecimal():
                paths[int(digits)] = path
        return dict(sorted(paths.items()))

    def write_intermediate_adapter(self, host: Host, job: Job) -> None:
        step = job.position.step
        path = self.job(job.name) / f"{_INTERMEDIATE}{step}"
        if path.exists():  # the step's end, its evaluation and Ctrl-C may each ask for it
            return
        epochs = f"{job.order.epochs_after(step):g} epochs"
        training = f"{epochs}, {job.position.tokens:,} tokens, seed {job.config.seed}"
        line = f"The weights after {step} of {job.total_steps} steps ({training})."
        card = _model_card(host, job, line)

        def fill(aside: Path) -> None:
            _write_adapter(aside, host, job, job.adapter.tensors(), card)

        with self._writing():
            write_directory(path, fill)

    def rotate_intermediate_adapters(self, job: Job, *, has_ended: bool = False) -> None:
        """Delete the intermediate adapters that an unbroken run does not have at this step."""
        paths = self.intermediate_adapters(job.name)
        needed = _steps_to_keep(job, paths, has_ended=has_ended)
        for step, path in paths.items():
            if step not in needed:
                with suppress(OSError):  # it is tried again after the next one
                    remove_directory(path)

    def write_job(self, host: Host, job: Job, result: JobResult) -> None:
        last = job.adapter.tensors()
        with self._writing():
            _write_adapter(self.job(job.name) / "checkpoints" / "last", host, job, last)
            card = _model_card(host, job, *_describe_result(result, job))
            kept = last if job.best is None else job.best
            _write_adapter(self.job(job.name), host, job, kept, card)
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
    config = job.adapter.config
    prompt = job.adapter.prompt
    write_adapter(path, config, tensors, host.base, card, prompt=prompt, overwrite=True)


def _steps_to_keep(job: Job, steps: Iterable[int], *, has_ended: bool) -> set[int]:
    """Choose the intermediate adapters of a job that stay.

    Those of `save_steps` stay, as many as `save_total_limit` allows. The others are the best
    evaluation's and an interruption's, which the job's directory replaces at its end.

    Source: transformers 5, trainer_utils.py, rotate_checkpoints.
    """
    train = job.config.train
    now, best = job.position.step, job.selection.step
    kept = []
    for step in steps:
        is_regular = train.save_steps is not None and step % train.save_steps == 0
        if step <= now and (is_regular or (step in (now, best) and not has_ended)):
            kept.append(step)
    if train.save_total_limit is None or not kept:
        return set(kept)
    protected = {kept[-1], best} & set(kept)
    num_deleted = max(len(kept) - max(train.save_total_limit, len(protected)), 0)
    deleted = [step for step in kept if step not in protected][:num_deleted]
    return set(kept) - set(deleted)


def _describe_result(result: JobResult, job: Job) -> list[str]:
    weights = f"{result.weights} weights of {result.steps} steps"
    if result.best is not None:
        weights += f", chosen by {result.best['metric']} after step {result.best['step']}"
    training = f"{result.epochs:g} epochs, {result.tokens:,} tokens, seed {job.config.seed}"
    lines = [f"The {weights} ({training})."]
    if result.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in result.metrics.items()]
    return lines


def _model_card(host: Host, job: Job, *results: str) -> str:
    return model_card(
        job.adapter.config,
        host.base,
        name=job.name,
        data="\n".join(f"- {line}" for line in job.training_set.report),
        results="\n".join(results),
        prompt=job.adapter.prompt,
    )
