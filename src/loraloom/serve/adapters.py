"""The adapters that requests may name, and which of them are on the host.

An adapter that was loaded again under its name is another one: rows that use the old one end with
it, and it goes when the last of them has ended. Where its files are what they were, the old one
stays instead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from loraloom.adapters.adapter import Adapter
from loraloom.adapters.files import CONFIG_FILE
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError, ConfigError, shown
from loraloom.models.host import Host
from loraloom.serve.threads import run_apart


class UnknownModelError(AdapterError):
    """There is no adapter of this name."""


class AllInUseError(AdapterError):
    """No more adapters can be loaded while those that are there are in use."""


@dataclass
class ServedAdapter:
    """An adapter on the host.

    Args:
        name: Under which requests know it.
        host_name: Under which the host does.
        source: Where it was loaded from; empty if it was on the host already.
        files: What they were like then (`_files_of`).
        is_lazy: It was loaded when it was first asked for, and may go when others are.
        num_users: Requests that use it.
        is_leaving: It takes no more requests.
    """

    name: str
    host_name: str
    source: str
    files: frozenset[tuple[str, int, int]] = frozenset()
    is_lazy: bool = False
    num_users: int = 0
    is_leaving: bool = False


class AdapterShelf:
    """Adapters by name; several threads may use it."""

    def __init__(
        self,
        host: Host,
        base_name: str,
        directory: Path | None = None,
        max_lazy: int = 8,
        on_removed: Callable[[Adapter], object] = lambda adapter: None,
    ):
        self.base_name = base_name
        self._host = host
        self._directory = directory
        self._max_lazy = max_lazy
        self._on_removed = on_removed
        self._loading = threading.Lock()  # held while files are read
        self._lock = threading.Lock()  # held for moments
        self._versions = count(2)
        self._served = {name: ServedAdapter(name, name, "") for name in host.adapters}
        self._leaving: list[ServedAdapter] = []

    def names(self) -> Mapping[str, str]:
        """Every adapter that may be asked for, and where its files are."""
        with self._lock:
            sources = {adapter.name: adapter.source for adapter in self._served.values()}
        return {**self._in_directory(), **sources}

    def acquire(self, name: str) -> ServedAdapter:
        """Begin to use an adapter, loaded now if need be, until `release`."""
        adapter = self.take(name)
        if adapter is not None:
            return adapter
        if name not in self._in_directory():  # before waiting for others to be loaded
            raise UnknownModelError(f"the model {shown(name)} does not exist")
        with self._loading:
            adapter = self.take(name)  # somebody else loaded it meanwhile
            if adapter is None:
                self._make_place()
                assert self._directory is not None
                self._load(name, str(self._directory / name), is_lazy=True)
                adapter = self.take(name)
        assert adapter is not None
        return adapter

    def release(self, adapter: ServedAdapter) -> None:
        """End using an adapter."""
        with self._lock:
            adapter.num_users -= 1
            is_done = adapter.is_leaving and adapter.num_users == 0
            if is_done:
                self._leaving.remove(adapter)
        if is_done:
            self._remove(adapter)

    def load(self, name: str, source: str, *, replace: bool = False) -> None:
        """Load an adapter from a directory or hub id."""
        check_name(name)
        with self._loading:
            if name == self.base_name or (name in self._served and not replace):
                raise ConfigError(
                    f"the name {shown(name)} is taken; unload it first, or choose another"
                )
            self._load(name, source, is_lazy=False)

    def unload(self, name: str) -> None:
        """Let an adapter take no more requests, and go when those that it has have ended."""
        with self._lock:
            adapter = self._served.pop(name, None)
        if adapter is None:
            raise UnknownModelError(f"no adapter {shown(name)} is loaded")
        self._let_go(adapter)

    def take(self, name: str) -> ServedAdapter | None:
        """Begin to use an adapter that is loaded; None if it isn't."""
        with self._lock:
            adapter = self._served.pop(name, None)
            if adapter is not None:
                self._served[name] = adapter  # the last one is the one that was used last
                adapter.num_users += 1
        return adapter

    def _load(self, name: str, source: str, *, is_lazy: bool) -> None:
        files = _files_of(source)
        adapter = self._take_back(source, files)
        if adapter is None:
            host_name = name
            while host_name in self._host.adapters:
                host_name = f"{name[:90]}.{next(self._versions)}"
            run_apart(partial(self._host.load, host_name, source))
            adapter = ServedAdapter(name, host_name, source, files)
        with self._lock:
            adapter.name, adapter.is_lazy = name, is_lazy
            former = self._served.pop(name, None)
            self._served[name] = adapter
        if former is not None:
            self._let_go(former)

    def _take_back(self, source: str, files: frozenset[Any]) -> ServedAdapter | None:
        """Keep the one of the same files that is leaving, if there is one, in place of a second."""
        with self._lock:
            for adapter in self._leaving:
                if files and (adapter.source, adapter.files) == (source, files):
                    self._leaving.remove(adapter)
                    adapter.is_leaving = False
                    return adapter
        return None

    def _make_place(self) -> None:
        """Let the adapter of the directory go that was not used for the longest time."""
        with self._lock:
            lazy = [adapter for adapter in self._served.values() if adapter.is_lazy]
            if len(lazy) < self._max_lazy:
                return
            idle = next((adapter for adapter in lazy if adapter.num_users == 0), None)
            if idle is None:
                raise AllInUseError(
                    f"at most {self._max_lazy} adapters are loaded at once, and all are in use; "
                    "try again later"
                )
            del self._served[idle.name]
        self._let_go(idle)

    def _let_go(self, adapter: ServedAdapter) -> None:
        with self._lock:
            is_done = adapter.num_users == 0
            if not is_done:
                adapter.is_leaving = True
                self._leaving.append(adapter)
        if is_done:
            self._remove(adapter)

    def _remove(self, adapter: ServedAdapter) -> None:
        removed = self._host.adapter(adapter.host_name)
        self._host.remove(adapter.host_name)
        self._on_removed(removed)

    def _in_directory(self) -> dict[str, str]:
        if self._directory is None or not self._directory.is_dir():
            return {}
        return {
            path.name: str(path)
            for path in sorted(self._directory.iterdir())
            if (path / CONFIG_FILE).is_file() and _is_name(path.name)
        }


def _files_of(source: str) -> frozenset[tuple[str, int, int]]:
    """Names, sizes and times of a directory's files; none on the Hub, or where it can't be read."""
    try:
        stats = [(file.name, file.stat()) for file in Path(source).iterdir() if file.is_file()]
    except (OSError, ValueError):  # loading says what is wrong with it
        return frozenset()
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _is_name(text: str) -> bool:
    try:
        return bool(check_name(text))
    except ConfigError:
        return False
