"""What a server does so that memory it has freed goes back to the system.

glibc maps an allocation of its own, and gives it back when it is freed, from a size on that it
raises to that of whatever was freed so far, up to 32 MiB. Then the tensors of adapters, caches and
prompts lie between one another in heaps that never shrink, and threads have heaps of their own.
"""

from __future__ import annotations

import ctypes
import platform

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of malloc.h
_LARGE_BYTES = 128 << 10
"""What glibc begins with."""
_NUM_HEAPS = 2


def return_freed_memory() -> bool:
    """Let large allocations go back when they are freed; return whether the C library can do so.

    It must be called before there are threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_THRESHOLD, _LARGE_BYTES), (_ARENA_MAX, _NUM_HEAPS))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)
