"""A server's process: who reaches it, with which keys, and what it does with memory and threads."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from loraloom.errors import ConfigError

_Value = TypeVar("_Value")
_ARENA_MAX = -8  # of malloc.h


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> list[str]:
    """Read API keys, one a line; empty lines and those that begin with # are left out."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file of API keys can't be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} must have an API key a line, it has none")
    return keys


def bound_memory(trim_s: float = 2.0) -> bool:
    """Keep freed memory and code of shapes few; return whether the C library gives memory back.

    It must be called before anything is multiplied, and before there are other threads.
    """
    # oneDNN, which multiplies in 16 bits, makes code for every shape that it meets and keeps that
    # of the last 1,024, up to a megabyte each
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the latter is ideep's
        os.environ.setdefault(name, "256")
    if platform.libc_ver()[0] != "glibc":
        return False
    # glibc keeps what is freed between allocations that live on, and threads have heaps of their
    # own; mapping every large tensor apart would cost a tenth of the engine's speed
    libc = ctypes.CDLL(None)
    is_bounded = libc.mallopt(_ARENA_MAX, 2) == 1

    def trim() -> None:
        while True:
            time.sleep(trim_s)
            libc.malloc_trim(0)

    threading.Thread(target=trim, daemon=True).start()
    return is_bounded


def run_apart(
    work: Callable[[], _Value],
    timeout_s: float | None = None,
    on_end: Callable[[], object] = lambda: None,
) -> _Value:
    """Do something that computes in a thread that ends with it, and return its result.

    On CPUs, GNU's OpenMP gives every thread that computes helpers, which live as long as it does.
    Once there are more of all threads' helpers than cores, they sleep after each operation in
    place of waiting for the next one, and a decoding step takes a third longer. So nobody may have
    helpers but the engine.
    """
    future: Future[_Value] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            on_end()
            future.set_exception(error)
        else:
            on_end()
            future.set_result(result)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return future.result(timeout=0)
