"""Joining the ranks that torchrun or accelerate started, if they did."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from loraloom.errors import ConfigError, TrainingError
from loraloom.models.loading import find_device
from loraloom.ranks import TIMEOUT, Alone, ProcessRanks, RankLost, Ranks

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


@dataclass(frozen=True)
class Launch:
    """A process among those that were started together.

    Args:
        rank: Its number among all.
        size: How many there are.
        local_rank: Its number among those on this machine.
        local_size: How many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read what torchrun, accelerate or another launcher says of this process.

    A process group that is there already says more than the variables.
    """
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        local = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
        return Launch(rank, size, *map(int, local))
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Launch()
    try:
        rank, size, local_rank = (int(environment[name]) for name in _NUMBERS)
        return Launch(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", size)))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{', '.join(_NUMBERS)} must be whole numbers where a launcher starts several "
            f"processes: {type(error).__name__}: {error}; start with `torchrun --nproc-per-node N "
            "-m loraloom train RUN.yaml`, or unset them to train in one process"
        ) from error


def rank_device(name: str, launch: Launch) -> str:
    """Choose a rank's device."""
    if launch.size == 1:
        return name
    device = find_device(name)
    if device.type not in _BACKENDS:
        raise ConfigError(
            f"device must be one of {', '.join(_BACKENDS)} where several ranks train, got "
            f"{device.type}; train in one process there"
        )
    if device.type == "cpu":
        return "cpu"
    if name not in ("auto", device.type):
        raise ConfigError(
            f"device must be {device.type} or auto where several ranks train, as each takes its "
            f"own, got {name}"
        )
    count = torch.get_device_module(device).device_count()
    if launch.local_size > count:
        raise ConfigError(
            f"each rank needs a {device.type} device of its own, got {launch.local_size} ranks and "
            f"{count} devices on this machine; start as many as there are devices, or take "
            "device: cpu"
        )
    return f"{device.type}:{launch.local_rank}"


@contextmanager
def joined_ranks(device: str, launch: Launch, *, in_lockstep: bool = False) -> Iterator[Ranks]:
    """Be one of the ranks for a while; a process that was started alone is alone.

    A process group that is there is used, and left as it is.
    """
    if launch.size == 1:
        yield Alone()
        return
    kind = torch.device(device)
    if kind.type != "cpu":
        torch.get_device_module(kind).set_device(kind)
    is_ours = not dist.is_initialized()
    if is_ours:
        _connect(_BACKENDS[kind.type], launch)
    try:
        yield ProcessRanks(_BACKENDS[kind.type], launch.local_size, in_lockstep=in_lockstep)
    except RankLost as lost:
        raise TrainingError(str(lost)) from lost
    finally:
        if is_ours:
            dist.destroy_process_group()


def _connect(backend: str, launch: Launch) -> None:
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:  # torch's own errors of the network are the former
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"rank {launch.rank} of {launch.size} can't join the others: {reason}; check that "
            "MASTER_ADDR and MASTER_PORT name the first one, and that the network lets it through"
        ) from error
