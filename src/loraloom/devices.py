"""All that depends on the kind of device: memory, caches, names, dtypes, backends of ranks.

A device has memory of its own, or takes the machine's, as a CPU and MPS do. What torch.accelerator
lacks (in 2.10 free memory and a limit of memory) comes from the module of the device's kind.
"""

import gc
import platform
import sys

import torch

# What processes on several devices of a kind talk through; those kinds can train over ranks.
RANK_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}


def best_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def count_devices(kind: str) -> int:
    return torch.get_device_module(kind).device_count()


def device_name(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return module.get_device_name(device) if has_separate_memory(device) else ""


def has_separate_memory(device: torch.device) -> bool:
    return device.type not in ("cpu", "mps")


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def multiplies_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return True
    # On x86, oneDNN says yes to AVX-512 alone, where it emulates at half the speed of float32.
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def free_device_bytes(device: torch.device) -> int:
    """Count what is free in a memory of its own."""
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return free


def peak_memory_bytes() -> dict[str, int]:
    """Return the most that this process has held so far: resident, and on each kind of device."""
    peak = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = best_device()
    if has_separate_memory(device):
        indices = range(torch.accelerator.device_count())
        peak[device.type] = sum(torch.accelerator.max_memory_allocated(index) for index in indices)
    return peak


def limit_memory(device: torch.device, limit: int) -> None:
    """Let allocations beyond a limit fail, on a device with a memory of its own."""
    module = torch.get_device_module(device)
    _, total = module.mem_get_info(device)
    module.set_per_process_memory_fraction(min(1.0, limit / total), device)


def free_memory() -> None:
    """Return unused memory to the device; an error that holds activations must be gone before."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
