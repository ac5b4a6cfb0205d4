"""The adapters that requests may name, and which of them are on the host.

An adapter follows its files: once they have changed, the next request loads them again, and once
they have gone, it does not exist. An adapter that was loaded again under its name is another one:
rows that use the old one end with it, and it goes when the last of them has ended.

Requests for adapters that are not loaded wait in the order in which they came, and loads are done
one at a time. If all places are in use, an adapter for each that waits takes no more requests, so
that nobody waits for longer than requests take. Downloads hold up nobody else.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from loraloom.adapters.files import CONFIG_FILE
from loraloom.adapters.method import Adapter
from loraloom.config.fields import check_name
from loraloom.errors import ConfigError, FormatError, shown
from loraloom.formats.hub import HUB_ID, find_adapter
from loraloom.generation.sequence import RequestError
from loraloom.models.host import Host
from loraloom.serve.process import run_apart

MAX_DOWNLOADS = 4

Files = frozenset[tuple[str, int, int, int]]
"""What a directory's files are like: names, sizes, times and inodes."""


@dataclass(eq=False)
class ServedAdapter:
    """An adapter on the host, or the base model.

    Args:
        name: Under which requests know it.
        host_name: Under which the host does; None is the base model.
        source: Where it was loaded from; empty if it was on the host already.
        files: What they were like then; empty for what is not a directory here.
        is_lazy: It was loaded when it was first asked for, and may go when others are.
        num_users: Requests that use it.
        is_leaving: It takes no more requests.
    """

    name: str
    host_name: str | None
    source: str = ""
    files: Files = frozenset()
    is_lazy: bool = False
    num_users: int = 0
    is_leaving: bool = False


@dataclass(eq=False)
class _Waiter:
    name: str
    adapter: Future[ServedAdapter] = field(default_factory=Future)


class ServedAdapters:
    """Adapters by name; several threads may use it."""

    def __init__(
        self,
        host: Host,
        base_name: str,
        directory: Path | None = None,
        max_lazy: int = 8,
        on_removed: Callable[[Adapter], object] = lambda adapter: None,
        download_s: float = 300.0,
        max_bytes: int | None = None,
    ):
        self.base_name = base_name
        self._host = host
        self._directory = directory
        self._max_lazy = max_lazy
        self._on_removed = on_removed
        self._download_s = download_s
        self._max_bytes: float = math.inf if max_bytes is None else max_bytes
        self._downloads = threading.BoundedSemaphore(MAX_DOWNLOADS)
        self._loading = threading.Lock()  # held while files are read
        self._lock = threading.RLock()  # held for moments, and never while others are told
        self._versions = count(2)
        self._base = ServedAdapter(base_name, None)
        self._served = {name: ServedAdapter(name, name) for name in host.adapters}
        self._sources: dict[str, str] = {}  # directories that were named, not found
        self._leaving: list[ServedAdapter] = []
        self._gone: deque[ServedAdapter] = deque()
        self._waiters: deque[_Waiter] = deque()
        self._is_loading = False

    def names(self) -> Mapping[str, str]:
        with self._lock:
            served, named = list(self._served.values()), dict(self._sources)
        found = {}
        if self._directory is not None and self._directory.is_dir():
            names = sorted(path.name for path in self._directory.iterdir())
            found = {name: str(self._directory / name) for name in names if self._is_found(name)}
        found |= {name: source for name, source in named.items() if _files_of(source)}
        return found | {
            one.name: one.source for one in served if not one.files or _files_of(one.source)
        }

    def take(self, name: str) -> ServedAdapter | None:
        """Begin to use an adapter that is loaded, and whose files are what they were."""
        adapter = self._take(name)
        self._remove_gone()
        return adapter

    def request(self, name: str) -> Future[ServedAdapter]:
        """Ask to use an adapter, until `release`; the future's error is why it can't be loaded."""
        waiter = _Waiter(name)
        with self._lock:
            if name not in self._served:
                self._source_of(name)
            self._waiters.append(waiter)
        self._serve_waiters()
        return waiter.adapter

    def abandon(self, adapter: Future[ServedAdapter]) -> None:
        if not adapter.cancel():
            adapter.add_done_callback(
                lambda done: None if done.exception() else self.release(done.result())
            )
        self._serve_waiters()

    def share(self, adapter: ServedAdapter, number: int) -> None:
        with self._lock:
            adapter.num_users += number - 1

    def release(self, adapter: ServedAdapter) -> None:
        with self._lock:
            adapter.num_users -= 1
            if adapter.is_leaving and adapter.num_users == 0:
                self._leaving.remove(adapter)
                self._gone.append(adapter)
        self._serve_waiters()

    def load(self, name: str, source: str, *, replace: bool = False) -> None:
        check_name(name)
        self._check_free(name, replace=replace)
        directory = self._fetch(source)
        with self._loading:
            self._check_free(name, replace=replace)
            self._load(name, source, directory, is_lazy=False)
        if _files_of(source):
            self._sources[name] = source
        self._serve_waiters()

    def unload(self, name: str) -> None:
        with self._lock:
            source, adapter = self._sources.pop(name, None), self._served.pop(name, None)
            if source is None and adapter is None:
                raise _unknown(f"no adapter {shown(name)} is loaded")
            if adapter is not None:
                self._let_go(adapter)
        self._serve_waiters()

    def _take(self, name: str) -> ServedAdapter | None:
        with self._lock:
            adapter = self._base if name == self.base_name else self._served.pop(name, None)
            if adapter is None:
                return None
            if adapter.files and adapter.files != _files_of(adapter.source):
                self._let_go(adapter)
                return None
            if adapter is not self._base:
                self._served[name] = adapter  # the last one is the one that was used last
            adapter.num_users += 1
        return adapter

    def _check_free(self, name: str, *, replace: bool) -> None:
        if name == self.base_name or (name in self._served and not replace):
            raise ConfigError(
                f"the name {shown(name)} is taken; unload it first, or choose another"
            )

    def _fetch(self, source: str) -> Path:
        """Give the directory of a source, downloaded in a thread apart if it is a hub id."""
        if os.path.isdir(source) or not HUB_ID.fullmatch(source):
            return find_adapter(source)
        if not self._downloads.acquire(blocking=False):
            raise RequestError(
                f"at most {MAX_DOWNLOADS} adapters are downloaded at once; try again later",
                "busy_downloading",
                retry_after_s=30,
            )
        try:
            download = partial(find_adapter, source)
            return run_apart(download, self._download_s, self._downloads.release)
        except TimeoutError:
            raise FormatError(
                f"the adapter {shown(source)} was not downloaded in {self._download_s:g} seconds; "
                "check the network, or download it first and load its directory"
            ) from None

    def _serve_waiters(self) -> None:
        """Hand adapters that are there to those that wait, and begin the next load."""
        self._remove_gone()
        found: list[tuple[_Waiter, ServedAdapter]] = []
        with self._lock:
            waiters = [one for one in self._waiters if not one.adapter.cancelled()]
            self._waiters.clear()
            for waiter in waiters:
                adapter = self._take(waiter.name)
                if adapter is None:
                    self._waiters.append(waiter)
                else:
                    found.append((waiter, adapter))
            if self._waiters and not self._is_loading and self._has_place():
                self._is_loading = True
                name = self._waiters[0].name
                threading.Thread(target=self._load_for, args=(name,), daemon=True).start()
        for waiter, adapter in found:
            if waiter.adapter.set_running_or_notify_cancel():
                waiter.adapter.set_result(adapter)
            else:
                self.release(adapter)
        self._remove_gone()

    def _has_place(self) -> bool:
        """Make a place for the adapter of the first that waits, if one can go for it."""
        if self._waiters[0].name in self._sources:
            return True  # it needs none
        lazy = [one for one in self._served.values() if one.is_lazy]
        num_leaving = sum(one.is_lazy for one in self._leaving)
        if len(lazy) + num_leaving < self._max_lazy:
            return True
        idle = [one for one in lazy if one.num_users == 0]
        num_wanted = len({one.name for one in self._waiters})
        for adapter in idle[:1] or lazy[: max(0, num_wanted - num_leaving)]:
            del self._served[adapter.name]
            self._let_go(adapter)
        return bool(idle)

    def _load_for(self, name: str) -> None:
        try:
            source = self._source_of(name)
            with self._loading:
                self._load(name, source, Path(source), is_lazy=name not in self._sources)
        except Exception as error:
            with self._lock:
                failed = [waiter for waiter in self._waiters if waiter.name == name]
                self._waiters = deque(one for one in self._waiters if one.name != name)
            for waiter in failed:
                if waiter.adapter.set_running_or_notify_cancel():
                    waiter.adapter.set_exception(error)
        finally:
            self._is_loading = False
        self._serve_waiters()

    def _load(self, name: str, source: str, directory: Path, *, is_lazy: bool) -> None:
        self._remove_gone()
        files, host_name = _files_of(source), name
        while host_name in self._host.adapters:
            host_name = f"{name[:90]}.{next(self._versions)}"
        if sum(size for _, size, *_ in _files_of(str(directory))) > self._max_bytes:
            raise self._no_memory(name)
        run_apart(partial(self._host.load, host_name, directory))
        adapter = ServedAdapter(name, host_name, source, files, is_lazy)
        self._make_room_for(adapter)
        with self._lock:
            former = self._served.pop(name, None)
            self._served[name] = adapter
            if former is not None:
                self._let_go(former)

    def _make_room_for(self, new: ServedAdapter) -> None:
        """Let unused adapters of the directory go until all fit the memory, or else the new one."""
        while True:
            with self._lock:  # others remove adapters meanwhile
                if sum(map(_bytes_of, self._host.adapters.values())) <= self._max_bytes:
                    return
                unused = (one for one in self._served.values() if one.is_lazy and not one.num_users)
                adapter = next(unused, new)
                if adapter is not new:
                    del self._served[adapter.name]
                self._gone.append(adapter)
            self._remove_gone()
            if adapter is new:
                raise self._no_memory(new.name)

    def _no_memory(self, name: str) -> RequestError:
        return RequestError(
            f"adapters may take {self._max_bytes:,} bytes together, {shown(name)} does not fit "
            "beside the others; unload some, or start the server with a larger "
            "--max-adapter-bytes",
            "adapter_memory",
        )

    def _let_go(self, adapter: ServedAdapter) -> None:
        adapter.is_leaving = adapter.num_users > 0
        (self._leaving if adapter.is_leaving else self._gone).append(adapter)

    def _remove_gone(self) -> None:
        while self._gone:
            with self._lock:
                if not self._gone:
                    return
                name = self._gone.popleft().host_name
                assert name is not None
                removed = self._host.adapter(name)
                self._host.remove(name)
            self._on_removed(removed)  # takes the engine's lock

    def _source_of(self, name: str) -> str:
        named = self._sources.get(name)
        if named is not None and _files_of(named):
            return named
        if self._directory is not None and self._is_found(name):
            return str(self._directory / name)
        raise _unknown(f"the model {shown(name)} does not exist")

    def _is_found(self, name: str) -> bool:
        try:
            check_name(name)
        except ConfigError:
            return False
        return self._directory is not None and (self._directory / name / CONFIG_FILE).is_file()


def _unknown(message: str) -> RequestError:
    return RequestError(message, "model_not_found", param="model")


def _files_of(source: str) -> Files:
    """What a directory's files are like; empty on the Hub, or where it can't be read."""
    try:
        files = [file for file in os.scandir(source) if file.is_file()] if source else []
        stats = [(file.name, file.stat()) for file in files]
    except (OSError, ValueError):  # loading says what is wrong with it
        return frozenset()
    return frozenset((name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats)


def _bytes_of(adapter: Adapter) -> int:
    return sum(one.numel() * one.element_size() for one in adapter.state_dict().values())
