"""Memory of the device that a model is on: an accelerator's, or the machine's, as MPS uses it."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil
import torch

# Left to others, and to what else is in the process.
_RESERVE_BYTES = 100_000_000


def has_separate_memory(device: torch.device) -> bool:
    return device.type not in ("cpu", "mps")


def used_bytes(device: torch.device) -> int:
    if has_separate_memory(device):
        return torch.accelerator.memory_allocated(device)
    return psutil.Process().memory_info().rss


def free_bytes(limit: int | None) -> int:
    """Memory of the machine that this process may still take, within a limit of the process."""
    free = psutil.virtual_memory().available - _RESERVE_BYTES
    return free if limit is None else min(free, limit - psutil.Process().memory_info().rss)


def limit_memory(device: torch.device, limit: int) -> None:
    """Let allocations beyond a limit fail; of the machine's memory, callers ask `free_bytes`."""
    if has_separate_memory(device):
        module = torch.get_device_module(device)
        _, total = module.mem_get_info(device)
        module.set_per_process_memory_fraction(min(1.0, limit / total), device)


@contextmanager
def restored_limit(device: torch.device) -> Iterator[None]:
    with ExitStack() as at_end:
        if has_separate_memory(device):
            module = torch.get_device_module(device)
            share = module.get_per_process_memory_fraction(device)
            at_end.callback(module.set_per_process_memory_fraction, share, device)
        yield


def free_memory() -> None:
    """Return unused memory to the device; an error that holds activations must be gone before."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
