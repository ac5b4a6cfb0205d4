"""The adapters that requests may name, and which of them are on the host.

An adapter follows its files. Rows that use an old one end with it, and it goes with the last. Loads
are done one at a time, once files are found. If all places are in use, one takes no more for the
first that waits, so that nobody waits for longer than requests take.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from loraloom.adapters.method import Adapter
from loraloom.config.fields import check_name
from loraloom.errors import ConfigError, shown
from loraloom.formats.disk import ADAPTER_FILES, CONFIG_FILE, find_adapter
from loraloom.generation.scheduler import EngineLimits
from loraloom.generation.sequence import RequestError
from loraloom.models.host import Host
from loraloom.serve.process import start_apart

# What sums are counted as, whatever their members are.
SUM = "(sum)"
# Times that a sum tries to find its adapters loaded together.
NUM_TRIES = 8
# Seconds in which an adapter must have come from the Hub.
DOWNLOAD_S = 300.0

# What an adapter's files are like: names, sizes, times and inodes. Others may be written meanwhile.
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
    members: tuple[ServedAdapter, ...] = ()  # of a sum, which uses each of them


class ServedAdapters:
    """Adapters by name; all is done in one event loop at a time."""

    def __init__(
        self,
        host: Host,
        base_name: str,
        directory: Path | None = None,
        max_lazy: int = 8,
        on_removed: Callable[[Adapter], object] = lambda adapter: None,
        max_bytes: int | None = None,
        max_waiting: int = EngineLimits.max_waiting,
        base_aliases: Sequence[str] = (),
    ):
        self.base_name = base_name
        self.base_names = (base_name, *base_aliases)
        self.num_waiting = 0  # requests for adapters that are not loaded
        self._max_waiting = max_waiting
        self._host = host
        self._directory = directory
        self._max_lazy = max_lazy
        self._on_removed = on_removed
        self._max_bytes: float = math.inf if max_bytes is None else max_bytes
        self._line = asyncio.Lock()  # of requests that wait for a place
        self._turn = asyncio.Lock()  # held while files are read
        self._loading: asyncio.Task[None] | None = None  # the last one's of that line
        self._released = asyncio.Event()
        self._versions = count(2)
        self._base = ServedAdapter(base_name, None)
        self._served = {name: ServedAdapter(name, name) for name in host.adapters}
        self._sources: dict[str, str] = {}  # directories that were named, not found
        self._leaving: list[ServedAdapter] = []

    def names(self) -> list[str]:
        """Every adapter that may be asked for."""
        paths = self._directory.iterdir() if self._directory and self._directory.is_dir() else ()
        found = [name for name in sorted(path.name for path in paths) if self._is_found(name)]
        named = [name for name, source in self._sources.items() if _files_of(source)]
        served = [a.name for a in self._served.values() if not a.files or _files_of(a.source)]
        return list(dict.fromkeys([*found, *named, *served]))

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
        if self.num_waiting >= self._max_waiting:
            raise _no_place(f"{self.num_waiting} requests wait for adapters that are not loaded")
        self.num_waiting += 1
        try:
            async with self._line:
                return await self._acquire_next(name)
        finally:
            self.num_waiting -= 1

    async def _acquire_next(self, name: str) -> ServedAdapter:
        if self._loading is not None and not self._loading.done():
            await asyncio.wait([self._loading])  # its request has gone, but it takes a place
        while (adapter := self.take(name)) is None:
            is_lazy = name not in self._sources  # others need no place
            while is_lazy and not self._has_place():
                self._released.clear()
                await self._released.wait()
            source = self._source_of(name)
            # a client that goes away meanwhile leaves nothing half loaded
            loading = self._load(name, source, Path(source), is_lazy=is_lazy)
            self._loading = asyncio.create_task(loading)
            await asyncio.shield(self._loading)
        return adapter

    async def acquire_sum(self, names: Sequence[str]) -> ServedAdapter:
        """Begin to use several adapters, all of them or none, until `release` of what they make."""
        for name in [one for one in names if one not in self._served]:
            self._source_of(name)  # what does not exist loads no other
        whole = dict.fromkeys(names)  # of which a sum may have several parts
        held = (self._served.get(name) for name in whole if name not in self._sources)
        if sum(one is None or one.is_lazy for one in held) > self._max_lazy:
            raise RequestError(
                f"a sum may have {self._max_lazy} adapters of --adapter-dir, as many as are loaded "
                f"at once (--max-adapters), got {', '.join(whole)}",
                param="model",
            )
        for _ in range(NUM_TRIES):
            taken = [adapter for name in names if (adapter := self.take(name)) is not None]
            if len(taken) == len(names):
                return ServedAdapter(SUM, None, num_users=1, members=tuple(taken))
            # nobody holds one and waits for another's place
            for adapter in taken:
                self.release(adapter)
            for name in names:
                self.release(await self.acquire(name))
        together = f"the adapters {', '.join(names)} must be loaded together"
        raise _no_place(f"{together}, but others are in use")

    def release(self, adapter: ServedAdapter) -> None:
        adapter.num_users -= 1
        for member in adapter.members if adapter.num_users == 0 else ():
            self.release(member)
        if adapter.is_leaving and adapter.num_users == 0:
            self._leaving.remove(adapter)
            self._remove(adapter)
        self._released.set()

    async def load(self, name: str, source: str, *, replace: bool = False) -> None:
        check_name(name)
        # apart from loads, whose threads slow downloads would take up
        finding = asyncio.wrap_future(start_apart(partial(find_adapter, source)))
        try:
            directory = await asyncio.wait_for(finding, DOWNLOAD_S)
        except TimeoutError:
            raise RequestError(
                f"the adapter {shown(source)} was not downloaded in {DOWNLOAD_S:g} seconds; "
                "retry to continue the download",
                "timeout",
            ) from None
        source = os.path.expanduser(source)  # as find_adapter does
        await self._load(name, source, directory, is_lazy=False, replace=replace)
        if _files_of(source):
            self._sources[name] = source

    def unload(self, name: str) -> None:
        """Let an adapter take no more requests, and go when those that it has have ended."""
        served = self._served.get(name)
        is_lazy = name not in self._sources and (served is None or served.is_lazy)
        if is_lazy and self._is_found(name):
            raise ConfigError(
                f"the adapter {shown(name)} is in --adapter-dir; to remove it, delete its directory"
            )
        source, adapter = self._sources.pop(name, None), self._served.pop(name, None)
        if source is None and adapter is None:
            raise unknown_model(name)
        if adapter is not None:
            self._let_go(adapter)

    def _has_place(self) -> bool:
        """Make a place for an adapter of the directory, if one can go for it."""
        lazy = [one for one in self._served.values() if one.is_lazy]
        leaving = [one for one in self._leaving if one.is_lazy]
        if len(lazy) + len(leaving) < self._max_lazy:
            return True
        idle = [one for one in lazy if one.num_users == 0]
        # one in use stays for who uses it; who asks for it next waits in line
        if idle or not leaving:
            self._let_go(self._served.pop((idle or lazy)[0].name))
        return bool(idle)

    async def _load(
        self, name: str, source: str, directory: Path, *, is_lazy: bool, replace: bool | None = None
    ) -> None:
        async with self._turn:
            if replace is None and name in self._served:  # another load came first, perhaps newer
                return
            taken = [*self._served, *self.names()] if replace is False else []
            if name in (*self.base_names, *taken):
                raise ConfigError(
                    f"the name {shown(name)} is taken; unload that adapter, or choose another name"
                )
            files, host_name = _files_of(source), name
            while host_name in self._host.adapters:
                host_name = f"{name[:90]}.{next(self._versions)}"
            await asyncio.wrap_future(start_apart(partial(self._host.load, host_name, directory)))
            adapter = ServedAdapter(name, host_name, source, files, is_lazy)
            if replace is None and not is_lazy and name not in self._sources:
                return self._remove(adapter)  # it was unloaded meanwhile
            self._make_room_for(adapter)
            former = self._served.pop(name, None)
            self._served[name] = adapter
            if former is not None:
                self._let_go(former)

    def _make_room_for(self, new: ServedAdapter) -> None:
        """Let unused adapters of the directory go until all fit the memory, or else the new one."""
        former = self._served.get(new.name)  # goes at once if nobody uses it
        goes = {former.host_name} if former is not None and not former.num_users else ()
        held = self._host.adapters if self._max_bytes < math.inf else {}  # adding up takes long
        sizes = {n: sum(x.nbytes for x in one.state_dict().values()) for n, one in held.items()}
        while sum(sizes[name] for name in held if name not in goes) > self._max_bytes:
            others = [one for one in self._served.values() if one is not former]
            unused = [one for one in others if one.is_lazy and not one.num_users]
            if not unused:
                self._remove(new)
                raise RequestError(
                    f"adapter {shown(new.name)} does not fit next to those in use: the limit for "
                    f"all is {self._max_bytes:,} bytes; retry later, or raise --max-adapter-bytes",
                    "adapter_memory",
                )
            self._let_go(self._served.pop(unused[0].name))

    def _let_go(self, adapter: ServedAdapter) -> None:
        adapter.is_leaving = adapter.num_users > 0
        (self._leaving.append if adapter.is_leaving else self._remove)(adapter)

    def _remove(self, adapter: ServedAdapter) -> None:
        assert adapter.host_name is not None
        removed = self._host.adapter(adapter.host_name)
        self._host.remove(adapter.host_name)
        self._on_removed(removed)
        self._released.set()

    def _source_of(self, name: str) -> str:
        if (named := self._sources.get(name)) and _files_of(named):
            return named
        if self._directory is not None and self._is_found(name):
            return str(self._directory / name)
        raise unknown_model(name)

    def _is_found(self, name: str) -> bool:
        try:
            check_name(name)
        except ConfigError:
            return False
        is_adapter = self._directory and (self._directory / name / CONFIG_FILE).is_file()
        return bool(is_adapter) and name not in self.base_names


def unknown_model(name: str) -> RequestError:
    return RequestError(f"the model {shown(name)} does not exist", "model_not_found", param="model")


def _no_place(fault: str) -> RequestError:
    advice = "retry later, or start the server with a larger --max-adapters"
    return RequestError(f"{fault}; {advice}", "queue_full")


def _files_of(source: str) -> Files:
    """What an adapter's files are like; empty on the Hub, or where they can't be read."""
    try:
        files = [one for one in os.scandir(source) if one.name in ADAPTER_FILES] if source else []
        stats = [(file.name, file.stat()) for file in files]
    except (OSError, ValueError):  # loading says what is wrong with it
        return frozenset()
    return frozenset((name, one.st_size, one.st_mtime_ns, one.st_ino) for name, one in stats)
