"""What a server does so that its memory doesn't grow with what it has been asked.

glibc keeps what is freed between allocations that live on: tensors of adapters, caches and prompts
lie between one another, and threads have heaps of their own. Asked to, it gives whole pages back.
Mapping every large tensor apart would do so at once, but costs a tenth of the engine's speed.

oneDNN, by which CPUs multiply matrices in 16 bits, makes code for every shape that it meets and
keeps that of the last 1,024, up to a megabyte each: prompts and batches of ever new lengths would
take up a gigabyte in the end.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time

TRIM_SECONDS = 2.0
_ARENA_MAX = -8  # of malloc.h
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


def return_freed_memory(seconds: float = TRIM_SECONDS) -> bool:
    """Let a thread give freed memory back from time to time; return whether the C library can.

    It must be called before there are other threads.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    is_bounded = libc.mallopt(_ARENA_MAX, _NUM_HEAPS) == 1

    def trim() -> None:
        while True:
            time.sleep(seconds)
            libc.malloc_trim(0)

    threading.Thread(target=trim, daemon=True).start()
    return is_bounded
