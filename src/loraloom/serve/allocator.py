"""What a server does so that its memory doesn't grow with what it has been asked.

glibc maps an allocation of its own, and gives it back when it is freed, from a size on that it
raises to that of whatever was freed so far, up to 32 MiB. Then the tensors of adapters, caches and
prompts lie between one another in heaps that never shrink, and threads have heaps of their own.

oneDNN, by which CPUs multiply matrices in 16 bits, makes code for every shape that it meets and
keeps that of the last 1,024, up to a megabyte each: prompts and batches of ever new lengths would
take up a gigabyte in the end.
"""

from __future__ import annotations

import ctypes
import os
import platform

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
_LARGE_BYTES = 128 << 10
"""What glibc begins with."""
_NUM_HEAPS = 2
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of torch's bindings to it (ideep)."""
_NUM_KERNELS = 256


def bound_kernel_caches() -> None:
    """Let oneDNN keep fewer shapes, unless the environment says how many.

    It must be called before anything is multiplied.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_NUM_KERNELS))


def return_freed_memory() -> bool:
    """Let large allocations go back when they are freed; return whether the C library can do so.

    It must be called before there are threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_THRESHOLD, _LARGE_BYTES), (_ARENA_MAX, _NUM_HEAPS))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
