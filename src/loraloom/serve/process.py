"""A server's process: who reaches it, with which keys, and what it does with memory and threads."""

import asyncio
import ctypes
import ipaddress
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from loraloom.errors import ConfigError, plain

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")
_ARENA_MAX = -8  # of malloc.h


class LineFormatter(logging.Formatter):
    """Writes records so that no text in one looks like another, or steers a terminal."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    @override
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record)).replace("\n", "\n    ")


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
        raise ConfigError(f"{path} contains no API key; write one key per line")
    return keys


class KeyFiles:
    """Keys of files, in lists that change at SIGHUP."""

    def __init__(self, *paths: Path | None):
        self._paths = paths
        self.keys = self._read()

    def watch(self) -> None:
        """Reread the files at SIGHUP, which without files ends the process."""
        if any(self._paths) and hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, self._reread)

    def _read(self) -> list[list[str]]:
        return [[] if path is None else read_keys(path) for path in self._paths]

    def _reread(self, *_: object) -> None:
        try:
            read = self._read()
        except ConfigError as error:  # then all keys stay as they were
            _log.error("SIGHUP: the API keys have not changed: %s", plain(str(error)))
            return
        for keys, new in zip(self.keys, read, strict=True):
            keys[:] = new
        _log.info("SIGHUP: the files of API keys were read again")


def bound_memory() -> None:
    """Keep freed memory and code of shapes few, before anything is multiplied or threads begin."""
    # oneDNN, which multiplies in 16 bits, makes code for every shape that it meets and keeps that
    # of the last 1,024, up to a megabyte each
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the latter is ideep's
        os.environ.setdefault(name, "256")
    if platform.libc_ver()[0] == "glibc":  # whose threads have heaps of their own
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


def start_apart(work: Callable[..., _Value], *arguments: object) -> Future[_Value]:
    """Do something that computes, or may take long, in a thread that ends with it."""
    # On CPUs, GNU's OpenMP gives every thread that computes helpers, which live as long as it does.
    # With more of them than cores, they sleep after each operation in place of waiting for the
    # next, and a decoding step takes a third longer. So nobody may have helpers but the engine.
    future: Future[_Value] = Future()
    future.set_running_or_notify_cancel()  # nobody cancels what is under way

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # which ends with Ctrl-C
    return future


async def run_apart(work: Callable[..., _Value], *arguments: object) -> _Value:
    return await asyncio.wrap_future(start_apart(work, *arguments))
