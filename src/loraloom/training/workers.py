"""Many jobs on many devices: each worker of a Ray cluster trains a share of a run's jobs.

Each worker has checkpoints of its jobs: when it is lost, Ray starts its task again, which resumes
from the newest. A sweep's study is a file that all workers share: each takes the next combination.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from typing_extensions import override

from loraloom.errors import ConfigError, TrainingError, shown
from loraloom.generation.loading import load_host
from loraloom.training.builder import check_data
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.engine import set_up
from loraloom.training.job import JobResult
from loraloom.training.reporting import Interruption, Progress
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import JobConfig, RunConfig

# How often Ray itself starts a lost worker again.
RESTARTS = 2
NEWS_S = 1.0
WAITING_S = 60
# What Ray reads when it is imported.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15, workers hardly run where others keep the cores busy
}
# Almost the least that Ray takes: nothing large goes through it.
_OBJECT_STORE_BYTES = 80_000_000


class _Messages(Progress):
    """Sends what is said to the user to the command's own process."""

    def __init__(self, queue: Any):
        super().__init__()
        self._queue = queue

    @override
    def message(self, text: str | int) -> None:
        with suppress(Exception):  # of a queue that was lost with its machine
            self._queue.put(text)


def train_share(
    run: RunConfig,
    jobs: Sequence[JobConfig],
    share: tuple[int, int],
    directory: Path,
    command: str,
    queue: Any,
) -> list[JobResult]:
    progress = _Messages(queue)
    progress.message(share[0])
    os.chdir(directory)
    if not run.output_dir.exists():  # the driver has made it
        raise ConfigError(
            f"output_dir must be visible to all workers, but {run.output_dir} is missing on "
            f"{socket.gethostname()}; choose a directory on a shared file system"
        )
    base = load_host(run, {})
    run_directory = RunDirectory(run.output_dir, worker=_directory_name(*share))
    engine, checkpoint = set_up(run, jobs, base, run_directory, progress, command, resume=True)
    engine.begin(checkpoint)
    if run.sweep is None:
        return engine.run()
    from loraloom.training.sweep import Sweep  # it needs Optuna

    sweep = Sweep(run, engine, progress, None, share)
    return engine.run(sweep.between_steps)


def _directory_name(number: int, num_workers: int) -> str:
    return f"worker-{number + 1}-of-{num_workers}"


def check_share(run: RunConfig, directory: Path) -> None:
    """Read the data where workers will read it, before earlier results go."""
    os.chdir(directory)
    check_data(run)


def train_with_ray(
    run: RunConfig,
    directory: RunDirectory,
    address: str,
    num_workers: int | None,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress,
    command: str,
) -> list[JobResult]:
    progress.message("starting Ray" if address == "auto" else f"connecting to Ray at {address}")
    with connected(address) as ray:
        if overwrite:
            progress.message("reading the data")
            checked = _outcome_of(ray, ray.remote(check_share).remote(run, Path.cwd()))
            if isinstance(checked, Exception):
                raise checked
        if not (resume and directory.worker_directories()):
            directory.prepare([job.name for job in run.all_jobs])
        results = _train_shares(ray, run, num_workers, directory, progress, command)
    order = {job.name: index for index, job in enumerate(run.all_jobs)}
    return sorted(results, key=lambda result: (order.get(result.job, len(order)), result.job))


def _train_shares(
    ray: Any,
    run: RunConfig,
    num_workers: int | None,
    directory: RunDirectory,
    progress: Progress,
    command: str,
) -> list[JobResult]:
    max_workers = len(run.jobs)
    show = None
    if run.sweep is not None:
        from loraloom.training.sweep import open_study, show_ranking  # it needs Optuna

        max_workers = run.sweep.max_concurrent or run.sweep.num_jobs
        study = open_study(run, directory, None)  # before workers look for combinations in it
        show = partial(show_ranking, run, study, directory, progress)
    num_workers = min(num_workers, max_workers) if num_workers else None
    size, resources = choose_resources(ray.nodes(), run.device, num_workers)
    size = min(size, max_workers)
    _check_shares(run, directory, size)
    progress.message(f"starting {size} workers")
    queue = ray.util.queue.Queue(actor_options={"num_cpus": 0})
    options = {"max_retries": RESTARTS, "scheduling_strategy": "SPREAD"} | resources
    task = ray.remote(train_share).options(**options)
    calls = {}
    for number in range(size):
        share = (number, size)
        call = task.remote(run, run.jobs[number::size], share, Path.cwd(), command, queue)
        calls[call] = number
    results, faults = _follow(ray, calls, queue, progress)
    if show is not None:
        show()
    if faults:
        raise faults[0]
    return results


def _check_shares(run: RunConfig, directory: RunDirectory, size: int) -> None:
    """Raise an error if a job is dealt to another worker than the one that has its checkpoint."""
    shares = {_directory_name(number, size): run.jobs[number::size] for number in range(size)}
    for path in directory.worker_directories():
        checkpoint, _ = CheckpointStore(path).newest()
        saved = set() if checkpoint is None else checkpoint.jobs.keys()
        share = {job.name for job in shares.get(path.name, ())}
        moved = saved & {job.name for job in run.jobs} - share
        if moved or path.name not in shares:
            raise ConfigError(
                "--resume with --ray requires the workers and the order of jobs of the "
                f"interrupted run, got {size} workers, but {path}; pass its number of workers as "
                "--ray-workers, and restore the order of jobs"
            )


def _follow(
    ray: Any, calls: dict[Any, int], queue: Any, progress: Progress
) -> tuple[list[JobResult], list[Exception]]:
    """Wait for workers, by their numbers, and pass on what they say."""
    size = len(calls)
    waiting = set(calls.values())
    begun_at = time.monotonic()
    waited_s = 0
    results: list[JobResult] = []
    faults: list[Exception] = []
    is_ending = False
    with Interruption(progress.message) as interruption:
        while calls:
            if interruption.requested and not is_ending:
                is_ending = True
                for call in calls:  # as by Ctrl-C, so that everything is saved
                    ray.cancel(call)
            for call in ray.wait([*calls], timeout=NEWS_S)[0]:
                waiting.discard(calls.pop(call))
                outcome = _outcome_of(ray, call)
                if not isinstance(outcome, Exception):
                    results += outcome
                elif not is_ending:
                    faults.append(outcome)
                    progress.message(f"error: {outcome}")
            waiting -= _pass_on(ray, queue, progress)
            if waiting and time.monotonic() - begun_at >= waited_s + WAITING_S:
                waited_s += WAITING_S
                numbers = ", ".join(str(number + 1) for number in sorted(waiting))
                progress.message(f"waiting for worker {numbers} of {size} ({waited_s} s)")
        if is_ending:
            interruption.end()
    return results, faults


def _pass_on(ray: Any, queue: Any, progress: Progress) -> set[int]:
    """Show what workers say, and return the numbers of those that have begun."""
    begun = set()
    with suppress(ray.exceptions.RayError):
        for news in queue.get_nowait_batch(queue.qsize()):
            if isinstance(news, str):
                progress.message(news)
            else:
                begun.add(news)
    return begun


def _outcome_of(ray: Any, call: Any) -> Any:
    """Return what a task returned, or what ended it."""
    try:
        return ray.get(call)
    except ray.exceptions.RayError as error:
        return getattr(error, "cause", None) or TrainingError(
            f"a worker was lost {RESTARTS + 1} times: {error}; when the other workers "
            "are done, pass --resume to continue its jobs"
        )


def choose_resources(
    nodes: Sequence[dict[str, Any]], device: str, num_workers: int | None
) -> tuple[int, dict[str, int]]:
    """Choose how many workers to start, and what each takes; Ray lets them wait for it."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    num_gpus = 0
    if device != "cpu":
        num_gpus = sum(int(resources.get("GPU", 0)) for resources in alive)
    if num_gpus:
        return num_workers or num_gpus, {"num_cpus": 0, "num_gpus": 1}
    cpus = [int(resources["CPU"]) for resources in alive if resources.get("CPU")]
    if not cpus:
        raise ConfigError(
            "--ray requires a cluster with cores or accelerators; start a node with --num-cpus"
        )
    size = num_workers or len(cpus)
    # Torch has as many threads as its worker has cores.
    return size, {"num_cpus": max(1, min(cpus) // -(-size // len(cpus))), "num_gpus": 0}


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a cluster, unless this process is connected, and give Ray's module."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
        import ray.util.queue
    except ImportError as error:
        raise ConfigError(
            "--ray requires Ray, which is not installed; run: pip install 'loraloom[ray]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    from ray._private import ray_constants

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":  # there, too
        address = "local"
        # One that runs here and that others may join: that of another run listens to itself alone.
        with suppress(OSError):
            address = _reached(ray._private.services.canonicalize_bootstrap_address("auto"))
    if address == "local":
        # Without this, Ray takes the machine's address on the network in place of the loopback, and
        # its servers listen to everybody.
        ray_constants.ENABLE_RAY_CLUSTER = False
        options |= {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        ray.init(address if address == "local" else _reached(address), **options)
    except Exception as error:  # a plain one if its start takes too long
        raise ConfigError(
            f"--ray must be auto or HOST:PORT of a cluster that can be reached, got "
            f"{shown(address)}: {error}; start one with `ray start --head`"
        ) from None


def _reached(address: str) -> str:
    """Return an address if somebody listens: else Ray would end the process after a minute."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    return address
