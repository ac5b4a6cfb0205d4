"""The processes that torchrun, accelerate or another launcher starts to train one run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from loraloom.errors import ConfigError, TrainingError
from loraloom.models.loading import find_device
from loraloom.ranks import TIMEOUT, Alone, ProcessRanks, RankLost, Ranks
from loraloom.training.settings import JobConfig

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
