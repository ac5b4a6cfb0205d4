"""The processes that torchrun, accelerate or another launcher starts to train one run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from loraloom.errors import ConfigError, TrainingError
from loraloom.ranks import TIMEOUT, Alone, ProcessRanks, RankLost, Ranks
from loraloom.training.settings import RunConfig

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


class Launch(NamedTuple):
    """A process among those that were started together, and among those on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        local = environment.get("LOCAL_RANK", rank), environment.get("LOCAL_WORLD_SIZE", size)
        return Launch(rank, size, *map(int, local))
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if len(given) == 1:
        raise ConfigError(
            f"RANK and WORLD_SIZE must be set together, as torchrun does, got {given[0]} alone; "
            "start the run with torchrun, or unset it"
        )
    get, size = environment.get, environment.get("WORLD_SIZE", 1)
    numbers = get("RANK", 0), size, get("LOCAL_RANK", 0), get("LOCAL_WORLD_SIZE", size)
    return Launch(*map(int, numbers))


def choose_device(
    run: RunConfig, launch: Launch, *, is_loaded: bool = False, is_watching: bool = False
) -> str:
    name = run.device
    if launch.size == 1:
        return name
    if run.sweep is not None or is_watching:
        raise ConfigError(
            f"{'--watch' if is_watching else 'sweep'} needs one process, got {launch.size} ranks; "
            "start it without torchrun, or spread a sweep's jobs over devices with --ray"
        )
    if run.parallel.base == "fsdp" and (is_loaded or run.quantization):
        raise ConfigError(
            "parallel.base: fsdp takes a base model apart as it is loaded, in floating point, got "
            f"{'one that is loaded: `base`' if is_loaded else 'quantization'}; leave that out, or "
            "take base: replicated"
        )
    for job in run.all_jobs:
        if not job.adapter.adds_up_over_ranks:
            raise ConfigError(
                f"job {job.name}: method {job.adapter.method} needs a single process, as its "
                f"router loss joins all tokens, got {launch.size} ranks; start it without torchrun"
            )
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    kind = found.type if name == "auto" else torch.device(name).type
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
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield ProcessRanks(backend, launch.local_size, in_lockstep=in_lockstep)
    except RankLost as lost:
        raise TrainingError(str(lost)) from lost
    finally:
        if is_ours:
            dist.destroy_process_group()
