"""The adapters that requests may name, and which of them are on the host.

An adapter follows its files: once they have changed, the next request loads them again, and once
they have gone, it does not exist. An adapter that was loaded again under its name is another one:
rows that use the old one end with it, and it goes when the last of them has ended.

Requests for adapters that are not loaded wait in the order in which they came, and loads are done
one at a time. If all places are in use, an adapter for each that waits takes no more requests, so
that nobody waits for longer than requests take. Downloads hold up nobody else.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from loraloom.adapters.method import Adapter
from loraloom.config.fields import check_name
from loraloom.errors import ConfigError, FormatError, shown
from loraloom.formats.disk import CONFIG_FILE
from loraloom.formats.hub import HUB_ID, find_adapter
from loraloom.generation.sequence import RequestError
from loraloom.models.host import Host
from loraloom.serve.process import run_apart

MAX_DOWNLOADS = 4

# What a directory's files are like: names, sizes, times and inodes.
Files = frozenset[tuple[str, int, int, int]]


@dataclass(eq=False)
class ServedAdapter:
    """An adapter on the host, or the base model."""

    name: str
    host_name: str | None  # None is the base model
    source: str = ""  # where it was loaded from, if not on the host already
    files: Files = frozenset()  # what they were like then; empty for what is no directory here
    is_lazy: bool = False  # loaded when it was first asked for, and may go when others are
    num_users: int = 0
    is_leaving: bool = False  # takes no more requests


class ServedAdapters:
    """Adapters by name; all is done in one event loop, but for `add`, which comes before."""

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
        self._turn = asyncio.Lock()  # held while files are read
        self._versions = count(2)
        self._base = ServedAdapter(base_name, None)
        self._served = {name: ServedAdapter(name, name) for name in host.adapters}
        self._sources: dict[str, str] = {}  # directories that were named, not found
        self._leaving: list[ServedAdapter] = []
        self._waiters: list[tuple[str, asyncio.Future[ServedAdapter]]] = []
        self._loader: asyncio.Task[None] | None = None

    def names(self) -> Mapping[str, str]:
        """Every adapter that may be asked for, and where its files are."""
        found = {}
        if self._directory is not None and self._directory.is_dir():
            names = sorted(path.name for path in self._directory.iterdir())
            found = {name: str(self._directory / name) for name in names if self._is_found(name)}
        found |= {name: source for name, source in self._sources.items() if _files_of(source)}
        served = self._served.values()
        return found | {
            one.name: one.source for one in served if not one.files or _files_of(one.source)
        }

    def take(self, name: str) -> ServedAdapter | None:
        """Begin to use an adapter that is loaded, and whose files are what they were."""
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

    async def acquire(self, name: str) -> ServedAdapter:
        """Begin to use an adapter, until `release`, as soon as it is loaded."""
        if (adapter := self.take(name)) is not None:
            return adapter
        self._source_of(name)  # what does not exist waits for nothing
        future: asyncio.Future[ServedAdapter] = asyncio.get_running_loop().create_future()
        self._waiters.append((name, future))
        self._serve_waiters()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:
                self.release(future.result())
            self._serve_waiters()
            raise

    def release(self, adapter: ServedAdapter) -> None:
        adapter.num_users -= 1
        if adapter.is_leaving and adapter.num_users == 0:
            self._leaving.remove(adapter)
            self._remove(adapter)
        self._serve_waiters()

    def add(self, name: str, source: str) -> None:
        self._check_free(name, replace=False)
        directory, files = find_adapter(source), _files_of(source)
        self._host.load(name, directory)
        adapter = ServedAdapter(name, name, source, files)
        self._make_room_for(adapter)
        self._served[name] = adapter
        if files:
            self._sources[name] = source

    async def load(self, name: str, source: str, *, replace: bool = False) -> None:
        self._check_free(name, replace=replace)
        directory = await self._fetch(source)
        async with self._turn:
            self._check_free(name, replace=replace)
            await self._load(name, source, directory, is_lazy=False)
        if _files_of(source):
            self._sources[name] = source
        self._serve_waiters()

    def unload(self, name: str) -> None:
        """Let an adapter take no more requests, and go when those that it has have ended."""
        source, adapter = self._sources.pop(name, None), self._served.pop(name, None)
        if source is None and adapter is None:
            raise _unknown(f"no adapter {shown(name)} is loaded")
        if adapter is not None:
            self._let_go(adapter)
        self._serve_waiters()

    def _check_free(self, name: str, *, replace: bool) -> None:
        check_name(name)
        if name == self.base_name or (name in self._served and not replace):
            raise ConfigError(
                f"the name {shown(name)} is taken; unload it first, or choose another"
            )

    async def _fetch(self, source: str) -> Path:
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
            return await asyncio.to_thread(
                run_apart, download, self._download_s, self._downloads.release
            )
        except TimeoutError:
            raise FormatError(
                f"the adapter {shown(source)} was not downloaded in {self._download_s:g} seconds; "
                "check the network, or download it first and load its directory"
            ) from None

    def _serve_waiters(self) -> None:
        """Hand adapters that are there to those that wait, and begin the next load."""
        for name, future in self._waiters:
            if not future.done() and (adapter := self.take(name)) is not None:
                future.set_result(adapter)
        self._waiters = [one for one in self._waiters if not one[1].done()]
        if self._waiters and self._loader is None and self._has_place():
            self._loader = asyncio.create_task(self._load_for(self._waiters[0][0]))

    def _has_place(self) -> bool:
        """Make a place for the adapter of the first that waits, if one can go for it."""
        if self._waiters[0][0] in self._sources:
            return True  # it needs none
        lazy = [one for one in self._served.values() if one.is_lazy]
        num_leaving = sum(one.is_lazy for one in self._leaving)
        if len(lazy) + num_leaving < self._max_lazy:
            return True
        idle = [one for one in lazy if one.num_users == 0]
        num_wanted = len({name for name, _ in self._waiters})
        # those in use stay for who uses them; who asks for them next waits in line
        for adapter in idle[:1] or lazy[: max(0, num_wanted - num_leaving)]:
            self._let_go(self._served.pop(adapter.name))
        return bool(idle)

    async def _load_for(self, name: str) -> None:
        try:
            source = self._source_of(name)
            async with self._turn:
                is_lazy = name not in self._sources
                await self._load(name, source, Path(source), is_lazy=is_lazy)
        except Exception as error:
            for other, future in self._waiters:
                if other == name and not future.done():
                    future.set_exception(error)
        finally:
            self._loader = None
        self._serve_waiters()

    async def _load(self, name: str, source: str, directory: Path, *, is_lazy: bool) -> None:
        files, host_name = _files_of(source), name
        while host_name in self._host.adapters:
            host_name = f"{name[:90]}.{next(self._versions)}"
        if sum(size for _, size, *_ in _files_of(str(directory))) > self._max_bytes:
            raise self._no_memory(name)
        # not in the pool's own thread, which would keep OpenMP's helpers
        load = partial(self._host.load, host_name, directory)
        await asyncio.to_thread(run_apart, load)
        adapter = ServedAdapter(name, host_name, source, files, is_lazy)
        self._make_room_for(adapter)
        former = self._served.pop(name, None)
        self._served[name] = adapter
        if former is not None:
            self._let_go(former)

    def _make_room_for(self, new: ServedAdapter) -> None:
        """Let unused adapters of the directory go until all fit the memory, or else the new one."""
        while sum(map(_bytes_of, self._host.adapters.values())) > self._max_bytes:
            served = self._served.values()
            unused = [one for one in served if one.is_lazy and not one.num_users]
            if not unused:
                self._remove(new)
                raise self._no_memory(new.name)
            self._let_go(self._served.pop(unused[0].name))

    def _no_memory(self, name: str) -> RequestError:
        return RequestError(
            f"adapters may take {self._max_bytes:,} bytes together, {shown(name)} does not fit "
            "beside the others; unload some, or start the server with a larger "
            "--max-adapter-bytes",
            "adapter_memory",
        )

    def _let_go(self, adapter: ServedAdapter) -> None:
        adapter.is_leaving = adapter.num_users > 0
        if adapter.is_leaving:
            self._leaving.append(adapter)
        else:
            self._remove(adapter)

    def _remove(self, adapter: ServedAdapter) -> None:
        assert adapter.host_name is not None
        removed = self._host.adapter(adapter.host_name)
        self._host.remove(adapter.host_name)
        self._on_removed(removed)

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
