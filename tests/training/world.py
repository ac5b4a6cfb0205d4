"""Ranks in processes of their own, as torchrun would start them."""

import gc
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

import loraloom
from loraloom.devices import peak_memory_bytes
from loraloom.distributed import own_part

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["loraloom.training.run"])


def run_ranks(num_ranks: int, work: Callable[..., None], *args: Any) -> list[int | None]:
    """Let ranks do a module's function together, which gets its rank; return their exit codes."""
    with tempfile.TemporaryDirectory() as directory:
        address = f"file://{Path(directory) / 'store'}"
        processes: list[BaseProcess] = [
            _PROCESSES.Process(target=_be_rank, args=(rank, num_ranks, address, work, args))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    return [process.exitcode for process in processes]


def _be_rank(
    rank: int, num_ranks: int, address: str, work: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_ranks)
    try:
        work(rank, *args)
    except loraloom.LoraloomError as error:
        sys.exit(f"rank {rank}: {error}")


def hold_base(rank: int, directory: Path, base_model: str, base: str) -> None:
    """Load a base model; write the bytes of its weights and what loading added to memory."""
    process = psutil.Process()
    before = process.memory_info().rss
    model, _ = loraloom.load_base_model(base_model, "bfloat16", sharded=base == "fsdp")
    most = peak_memory_bytes()["rss"] - before
    gc.collect()
    parts = [own_part(weight) for weight in model.parameters()]
    held = sum({part.data_ptr(): part.nbytes for part in parts}.values())
    added = process.memory_info().rss - before
    (directory / f"{rank}.json").write_text(json.dumps([held, added, most]))
