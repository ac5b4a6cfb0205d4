"""Several processes that train one run: joining them, and doing what the first one decides.

torchrun, accelerate or another launcher starts them. A sweep and an inbox go by a clock and files,
so the first rank alone has theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from loraloom.errors import ConfigError, TrainingError
from loraloom.models.loading import find_device
from loraloom.ranks import TIMEOUT, Alone, ProcessRanks, RankLost, Ranks
from loraloom.training.engine import Engine
from loraloom.training.job import Job
from loraloom.training.results import JobResult
from loraloom.training.settings import JobConfig
from loraloom.training.step.optimizers import rehearse

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


class Launch(NamedTuple):
    """A process among those that were started together, and among those on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read what a launcher, or a process group that is there, says of this process."""
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        local = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
        return Launch(rank, size, *map(int, local))
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Launch()
    try:
        rank, size, local_rank = (int(environment[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return Launch(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", size)))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers where a launcher starts several "
            f"processes: {type(error).__name__}: {error}; start with `torchrun --nproc-per-node N "
            "-m loraloom train RUN.yaml`, or unset them to train in one process"
        ) from error


def rank_device(name: str, launch: Launch) -> str:
    if launch.size == 1:
        return name
    kind = find_device(name).type
    if kind not in _BACKENDS or (kind != "cpu" and name not in ("auto", kind)):
        raise ConfigError(
            f"device must be auto or one of {', '.join(_BACKENDS)} where several ranks train, as "
            f"each takes a device of its own, got {name if kind in _BACKENDS else kind}"
        )
    if kind == "cpu":
        return kind
    count = torch.get_device_module(kind).device_count()
    if launch.local_size > count:
        raise ConfigError(
            f"each rank needs a {kind} device of its own, got {launch.local_size} ranks and "
            f"{count} devices on this machine; start as many as there are devices, or take "
            "device: cpu"
        )
    return f"{kind}:{launch.local_rank}"


@contextmanager
def joined_ranks(device: str, launch: Launch, *, in_lockstep: bool = False) -> Iterator[Ranks]:
    """Be one of the ranks for a while; a process that was started alone is alone."""
    if launch.size == 1:
        yield Alone()
        return
    kind = torch.device(device)
    backend = _BACKENDS[kind.type]
    if kind.type != "cpu":
        torch.get_device_module(kind).set_device(kind)
    # A process group that is there is used, and left as it is.
    is_ours = not dist.is_initialized()
    if is_ours:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            # torch's own errors of the network are the former.
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"rank {launch.rank} of {launch.size} can't join the others: {reason}; check that "
                "MASTER_ADDR and MASTER_PORT name the first one, and that the network lets it "
                "through"
            ) from error
    try:
        yield ProcessRanks(backend, launch.local_size, in_lockstep=in_lockstep)
    except RankLost as lost:
        raise TrainingError(str(lost)) from lost
    finally:
        if is_ours:
            dist.destroy_process_group()


def check_adds_up(job: JobConfig, num_ranks: int) -> None:
    """Check that a job can share its rows among so many ranks."""
    if num_ranks > 1 and not job.adapter.adds_up_over_ranks:
        raise ConfigError(
            f"job {job.name}: method {job.adapter.method} needs a single process, as its "
            f"router loss joins all tokens, got {num_ranks} ranks; start it without torchrun"
        )


class Lead:
    """An engine as the first rank's decisions see it; a single process is the first one.

    What the first rank lets its engine do between two rounds, the others are told and let theirs
    do. What fails on one rank fails on all, and the first one deals with it.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.jobs, self.recall = engine.jobs, engine.recall
        self._ranks = engine.host.ranks
        self._heard_of_interruption = False
        self._built: Job | None = None

    @property
    def results(self) -> dict[str, JobResult]:
        return self.engine.results

    @property
    def joined(self) -> set[str]:
        return self.engine.joined

    @property
    def is_interrupted(self) -> bool:
        """Whether this rank was interrupted, or told of another one that was."""
        return self._heard_of_interruption or self.engine.interruption.requested

    def between_steps(self, decide: Callable[[Lead], None]) -> Callable[[Engine], None]:
        """Make a callback for the engine of each rank; `decide` is called on the first one."""

        def callback(_: Engine) -> None:
            if self._ranks.is_first:
                decide(self)
                self._tell("go on")
                return
            while (told := self._tell())[0] != "go on":
                with suppress(Exception):
                    self._do(*told)

        return callback

    def build(self, config: JobConfig, *, reads_data: bool = False) -> Job:
        """Build a job on all ranks; see `JobBuilder.build`."""
        check_adds_up(config, self._ranks.size)
        rehearse(config.train, config.name)
        self._tell("build", config.model_dump_json(), reads_data)
        return self._build(config, reads_data)

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let the job that was built last join; see `Engine.add`."""
        self._do(*self._tell("add", sorted(job.milestones), overwrite))

    def stop(self, name: str, reason: str) -> JobResult:
        return self._do(*self._tell("stop", name, reason))

    def save_if_due(self, *, may_wait: bool) -> None:
        self._do(*self._tell("save", may_wait))

    def _tell(self, *action: Any) -> list[Any]:
        """Exchange actions among the ranks, and return that of the first one."""
        told = self._ranks.gather([self.engine.interruption.requested, *action])
        self._heard_of_interruption = any(is_interrupted for is_interrupted, *_ in told)
        return told[0][1:]

    def _do(self, action: str, *values: Any) -> Any:
        match action:
            case "build":
                config, reads_data = values
                return self._build(JobConfig.model_validate_json(config), reads_data)
            case "add" if self._built is not None:
                milestones, overwrite = values
                self._built.milestones = frozenset(milestones)
                self.engine.add(self._built, overwrite=overwrite)
            case "stop":
                return self.engine.stop(*values)
            case "save":
                self.engine.save_if_due(may_wait=values[0])

    def _build(self, config: JobConfig, reads_data: bool) -> Job:
        self._built = job = None
        try:
            with self._ranks.together():
                job = self.engine.builder.build(config, reads_data=reads_data)
            if self._ranks.check_alike({config.name: job.training_set.digest}):
                raise ConfigError(
                    f"job {config.name}: all {self._ranks.size} ranks must have the same data; let "
                    "all machines see the same files"
                )
        except Exception:
            if job is not None:
                self.engine.discard(job)
            raise
        self._built = job
        return job
