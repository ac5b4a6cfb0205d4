"""The adapters that requests may name, and which of them are on the host.

An adapter follows its files: a request loads those that have changed, and the old adapter answers
until the new one can be read. Adapters of the directory take places and bytes, which tenants (API
keys) share by turns. Loads are done one at a time: the tenants that hold less than an equal part of
the places take turns, and none takes what the next one in turn waits for. A tenant that holds no
adapter when all are in use loads one more, so that nobody waits for others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from loraloom.adapters.contract import Adapter
from loraloom.config.fields import check_name
from loraloom.errors import ConfigError, LoraloomError, shown
from loraloom.formats.raw_files import find_adapter
from loraloom.generation.request import RequestError
from loraloom.generation.scheduler import EngineLimits
from loraloom.generation.tenants import FairLine, has_place
from loraloom.host.host import Host
from loraloom.serve.adapter_files import (
    Files,
    digest_of,
    files_of,
    find_files,
    has_config,
    is_name,
    names_below,
    num_bytes_of,
)
from loraloom.serve.process import run_apart

_log = logging.getLogger(__name__)
# What sums are counted as, whatever their members are.
SUM = "(sum)"
# Times that a sum tries to find its adapters loaded together.
NUM_TRIES = 8
# Seconds in which an adapter must have come from the Hub.
DOWNLOAD_S = 300.0


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter on the host."""

    name: str
    host_name: str
    source: str = ""  # where it was loaded from, if not on the host already
    files: Files = frozenset()  # what they were like then; empty for what is no directory here
    revision: str | None = None  # digest of the files
    is_lazy: bool = False  # loaded when it was first asked for, and may go when others are
    num_bytes: int = 0
    users: Counter[str] = field(default_factory=Counter)  # requests of each tenant


@dataclass(eq=False)
class ServedAdapter:
    """What a request uses until each of its completions has ended."""

    name: str
    tenant: str
    adapters: tuple[LoadedAdapter, ...] = ()  # none for the base model
    num_users: int = 1


@dataclass(eq=False)
class LoadRequest:
    """A request that waits for an adapter."""

    name: str
    tenant: str
    num_bytes: int
    served: asyncio.Future[ServedAdapter]


@dataclass(eq=False)
class ServedAdapters:
    """Adapters by name; all is done in one event loop at a time, but threads read files."""

    host: Host
    base_name: str
    directory: Path | None = None
    max_lazy: int = 8
    on_removed: Callable[[Adapter], object] = lambda adapter: None
    max_waiting: int = EngineLimits.max_waiting
    base_aliases: Sequence[str] = ()
    max_bytes: int = sys.maxsize  # of all adapters

    def __post_init__(self) -> None:
        self.base_names = (self.base_name, *self.base_aliases)
        self._line: FairLine[LoadRequest] = FairLine()  # of tenants, which use loads
        self._loading: asyncio.Task[None] | None = None  # for those in line
        self._lock = asyncio.Lock()  # held while files are read
        self._versions = count(2)
        self._loaded = {name: LoadedAdapter(name, name) for name in self.host.adapters}
        self._sources: dict[str, str] = {}  # directories that were named, not found
        self._leaving: list[LoadedAdapter] = []  # which take no more requests
        self._broken: dict[str, Files] = {}  # that can't be loaded as they are

    @property
    def num_waiting(self) -> int:
        return len(self._line)

    async def names(self) -> list[str]:
        """Every adapter that may be asked for."""
        sources = list(self._sources.items())
        loaded = list(self._loaded.values())

        def scan() -> list[str]:
            names = [name for name in names_below(self.directory) if name not in self.base_names]
            names += [name for name, source in sources if files_of(source)]
            for adapter in loaded:
                if not adapter.files or files_of(adapter.source) is not None:
                    names.append(adapter.name)
            return list(dict.fromkeys(names))

        return await run_apart(scan)

    def loaded(self, name: str) -> LoadedAdapter | None:
        return self._loaded.get(name)

    def names_in_use(self) -> set[str]:
        """The adapters that requests use now, whether they may still be asked for or not."""
        return {a.name for a in (*self._loaded.values(), *self._leaving) if a.users}

    async def acquire(self, name: str, tenant: str = "") -> ServedAdapter:
        """Begin to use an adapter, until `release`, as soon as it is loaded."""
        served = await self.take([name], tenant)
        if served is not None:
            return served
        counts = self._line.counts
        if not has_place(counts, tenant, self.max_waiting):
            num_waiting = counts.get(tenant, 0)
            raise _no_place(f"{num_waiting} requests wait for adapters that are not loaded")
        num_bytes = await self._num_bytes_of(name)
        request = LoadRequest(name, tenant, num_bytes, asyncio.get_running_loop().create_future())
        self._line.add(tenant, request)
        self._advance()
        try:
            return await request.served
        except asyncio.CancelledError:
            if request in self._line:
                self._line.remove(tenant, request)
            elif not request.served.cancelled() and request.served.exception() is None:
                self.release(request.served.result())  # it came too late
            raise

    async def take(self, names: Sequence[str], tenant: str = "") -> ServedAdapter | None:
        """Begin to use adapters that are all on the host, and need not be loaded again."""
        files = [(await self._look(name))[1] for name in names]
        adapters = map(self._current, names, files)
        members = tuple(adapter for adapter in adapters if adapter is not None)
        if len(members) < len(names):
            return None
        return self._use(SUM if len(names) > 1 else names[0], members, tenant)

    async def acquire_sum(self, names: Sequence[str], tenant: str = "") -> ServedAdapter:
        """Begin to use several adapters, all of them or none, until `release` of what they make."""
        distinct = dict.fromkeys(names)  # a sum may have several parts of one
        for name in distinct:
            await self._look(name)  # what does not exist loads no other
        held = (self._loaded.get(name) for name in distinct if name not in self._sources)
        if sum(adapter is None or adapter.is_lazy for adapter in held) > self.max_lazy:
            raise RequestError(
                f"a sum may have {self.max_lazy} adapters of --adapter-dir, as many as are loaded "
                f"at once (--max-adapters), got {', '.join(distinct)}",
                param="model",
            )
        await self._check_sum(list(distinct))
        for _ in range(NUM_TRIES):
            served = await self.take(names, tenant)
            if served is not None:
                return served
            # nobody holds one and waits for another's place
            for name in names:
                self.release(await self.acquire(name, tenant))
        together = ", ".join(names)
        raise _no_place(f"the adapters {together} must be loaded together, but others are in use")

    def release(self, served: ServedAdapter) -> None:
        served.num_users -= 1
        if served.num_users:
            return
        for adapter in served.adapters:
            adapter.users -= Counter([served.tenant])
            if adapter in self._leaving and not adapter.users:
                self._leaving.remove(adapter)
                self._remove(adapter)
        self._evict_idle()
        self._advance()

    async def load(
        self, name: str, source: str, *, replace: bool = False, sender: str = "the command line"
    ) -> None:
        check_name(name)
        directory = await self._find(source)
        source = os.path.expanduser(source)  # as find_adapter does
        async with self._lock:
            taken = [] if replace else [*self._loaded, *await self.names()]
            if name in (*self.base_names, *taken):
                raise ConfigError(
                    f"the name {shown(name)} is taken; unload that adapter, or choose another name"
                )
            files = await run_apart(files_of, source) or frozenset()
            adapter = await self._read(name, source, directory, files)
            self._put(adapter, sender)
            self._evict_idle()
            if files:
                self._sources[name] = source
        self._advance()

    async def unload(self, name: str, sender: str = "") -> None:
        """Let an adapter take no more requests, and go when those that it has have ended."""
        below = await run_apart(names_below, self.directory)
        loaded = self._loaded.get(name)
        is_named = name in self._sources or (loaded is not None and not loaded.is_lazy)
        if name in below and not is_named:
            raise ConfigError(
                f"the adapter {shown(name)} is in --adapter-dir; to remove it, delete its directory"
            )
        source = self._sources.pop(name, None)
        adapter = self._loaded.pop(name, None)
        if source is None and adapter is None:
            raise unknown_model(name)
        if adapter is not None:
            _note("unloaded", adapter, sender)
            self._let_go(adapter)
        self._advance()

    def _use(self, name: str, adapters: tuple[LoadedAdapter, ...], tenant: str) -> ServedAdapter:
        for adapter in adapters:
            adapter.users[tenant] += 1
            # the last is the one that was used last
            self._loaded[adapter.name] = self._loaded.pop(adapter.name)
        return ServedAdapter(name, tenant, adapters)

    async def _look(self, name: str) -> tuple[str, Files]:
        """Find an adapter's directory and describe its files as they are now."""
        adapter = self._loaded.get(name)
        if adapter is not None and not adapter.files:
            return adapter.source, adapter.files
        sources = [self._sources[name]] if name in self._sources else []
        if self.directory is not None and name not in self.base_names and is_name(name):
            sources.append(str(self.directory / name))
        loaded_from = "" if adapter is None else adapter.source
        location = await run_apart(find_files, sources, loaded_from)
        if location is None:
            self._broken.pop(name, None)
            if adapter is not None and self._loaded.get(name) is adapter:
                _note("removed", self._loaded.pop(name), "its directory, which is gone")
                self._let_go(adapter)
            raise unknown_model(name)
        return location

    def _current(self, name: str, files: Files) -> LoadedAdapter | None:
        """Return the adapter that answers now; None if its files are to be loaded first."""
        adapter = self._loaded.get(name)
        if self._broken.get(name) == files:
            if adapter is None:
                raise _broken(name)
            return adapter
        # without adapter_config.json, they are being written
        is_new = adapter is None or (files != adapter.files and has_config(files))
        return None if is_new else adapter

    def _advance(self) -> None:
        """Begin the next load, if one is waited for and has a place."""
        if self._loading is not None or not self._line:
            return
        held = Counter(tenant for adapter in self._lazy() for tenant in adapter.users)
        equal_part = self.max_lazy / len(self._line.waiting.keys() | held.keys())
        # First who would hold no more than an equal part; among those, in turn.
        is_blocked = False
        for tenant in sorted(self._line.in_turn(), key=lambda t: max(held[t] + 1, equal_part)):
            for request in self._line.waiting[tenant]:
                if (
                    self._needs_no_place(request)
                    or (not is_blocked and self._make_place(request, held))
                    or not held[tenant]
                ):
                    self._line.charge(tenant, 1)
                    self._loading = asyncio.create_task(self._load_for(request.name))
                    return
                is_blocked = True  # what leaves is for the first one

    def _needs_no_place(self, request: LoadRequest) -> bool:
        """Whether an adapter is loaded again, was named, or is too large and will be refused."""
        name = request.name
        if name in self._loaded or name in self._sources:
            return True
        return request.num_bytes > self._room_bytes(name)

    def _make_place(self, request: LoadRequest, held: Counter[str]) -> bool:
        """Let adapters go until one of the directory fits; False if it must wait for them."""
        self._evict_idle(1, request.num_bytes)
        if self._fits(1, request.num_bytes):
            return True

        # The place comes from who holds most. The adapter goes when its requests have ended, and
        # who asks for it next waits.
        def standing(adapter: LoadedAdapter) -> tuple[int, bool]:
            return min(held[user] for user in adapter.users), request.tenant in adapter.users

        while held[request.tenant] and not self._will_fit(request):
            self._evict(max(self._in_use(), key=standing))
        return False

    def _fits(self, num_places: int, num_bytes: int) -> bool:
        """Whether so many places and bytes are free."""
        if len(self._lazy()) + num_places > self.max_lazy:
            return False
        used_bytes = sum(a.num_bytes for a in (*self._loaded.values(), *self._leaving))
        return used_bytes + num_bytes <= self.max_bytes

    def _will_fit(self, request: LoadRequest) -> bool:
        """Whether the adapters that leave make a place."""
        if not any(adapter.is_lazy for adapter in self._leaving):
            return False
        staying_bytes = sum(adapter.num_bytes for adapter in self._loaded.values())
        return staying_bytes + request.num_bytes <= self.max_bytes

    def _room_bytes(self, name: str) -> int:
        """Count the bytes that an adapter may take: all but those of adapters that stay."""
        staying = [a for a in self._loaded.values() if not a.is_lazy and a.name != name]
        return self.max_bytes - sum(adapter.num_bytes for adapter in staying)

    def _check_bytes(self, names: Sequence[str], num_bytes: int) -> None:
        room_bytes = self._room_bytes(names[0])
        if num_bytes > room_bytes:
            adapters = " + ".join(map(shown, names))
            raise RequestError(
                f"the adapter {adapters} takes {num_bytes:,} bytes, but --max-adapter-bytes "
                f"leaves {room_bytes:,}; start the server with a larger --max-adapter-bytes",
                "adapter_memory",
            )

    def _lazy(self) -> list[LoadedAdapter]:
        return [a for a in (*self._loaded.values(), *self._leaving) if a.is_lazy]

    def _idle(self) -> list[LoadedAdapter]:
        return [a for a in self._loaded.values() if a.is_lazy and not a.users]

    def _in_use(self) -> list[LoadedAdapter]:
        return [a for a in self._loaded.values() if a.is_lazy and a.users]

    def _evict_idle(self, num_places: int = 0, num_bytes: int = 0) -> None:
        """Let adapters go that nobody uses, first those used least recently, until others fit."""
        for adapter in self._idle():
            if self._fits(num_places, num_bytes):
                return
            self._evict(adapter)

    async def _load_for(self, name: str) -> None:
        adapter, error = None, None
        try:
            async with self._lock:
                source, files = await self._look(name)
                # another load may have come first
                adapter = self._current(name, files) or await self._follow(name, source, files)
        except Exception as failure:
            error = failure
        self._loading = None
        for request in [request for request in self._line if request.name == name]:
            self._line.remove(request.tenant, request)
            if request.served.cancelled():
                continue
            if adapter is not None:
                request.served.set_result(self._use(name, (adapter,), request.tenant))
            elif error is not None:
                request.served.set_exception(error)
        self._evict_idle()
        self._advance()

    async def _follow(self, name: str, source: str, files: Files) -> LoadedAdapter:
        """Load files that are new or have changed; an old adapter stays until they can be read."""
        is_lazy = name not in self._sources
        try:
            adapter = await self._read(name, source, Path(source), files, is_lazy=is_lazy)
            if not is_lazy and name not in self._sources:  # it was unloaded meanwhile
                self._remove(adapter)
                raise unknown_model(name)
            if name in self._loaded and files != await run_apart(files_of, source):
                self._remove(adapter)
                fault = f"the files of adapter {shown(name)} are being written; retry later"
                raise RequestError(fault, "queue_full")
            self._put(adapter, "its directory")
            return adapter
        except LoraloomError as error:
            former = self._loaded.get(name)
            is_passing = isinstance(error, RequestError) or isinstance(error.__cause__, OSError)
            if former is None and isinstance(error, RequestError):
                raise
            _log.warning("adapter %s can't be loaded: %s", shown(name), error)
            if not is_passing:
                self._broken[name] = files
            if former is None:
                raise _broken(name) from None
            return former

    async def _num_bytes_of(self, name: str) -> int:
        """Count the bytes of an adapter's files as they are now."""
        source, _ = await self._look(name)
        return await run_apart(num_bytes_of, Path(source))

    async def _check_sum(self, names: Sequence[str]) -> None:
        """Refuse a sum whose adapters never fit the bound together."""
        num_bytes = 0
        for name in names:
            adapter = self._loaded.get(name)
            if adapter is None or adapter.is_lazy:
                num_bytes += await self._num_bytes_of(name)
        self._check_bytes(names, num_bytes)

    async def _find(self, source: str) -> Path:
        # perhaps from the Hub
        try:
            return await asyncio.wait_for(run_apart(find_adapter, source), DOWNLOAD_S)
        except TimeoutError:
            raise RequestError(
                f"the adapter {shown(source)} was not downloaded in {DOWNLOAD_S:g} seconds; "
                "retry to continue the download",
                "timeout",
            ) from None

    async def _read(
        self, name: str, source: str, directory: Path, files: Files, *, is_lazy: bool = False
    ) -> LoadedAdapter:
        """Read an adapter into the host, under a name that is free there."""
        num_bytes = await run_apart(num_bytes_of, directory)
        self._check_bytes([name], num_bytes)
        host_name = name
        while host_name in self.host.adapters:
            host_name = f"{name[:90]}.{next(self._versions)}"

        revision = await run_apart(digest_of, directory)
        await run_apart(self.host.load, host_name, directory)
        return LoadedAdapter(name, host_name, source, files, revision, is_lazy, num_bytes)

    def _put(self, adapter: LoadedAdapter, sender: str) -> None:
        """Let an adapter answer from now on, in place of the former one of its name."""
        former = self._loaded.pop(adapter.name, None)
        self._loaded[adapter.name] = adapter
        self._broken.pop(adapter.name, None)
        _note("loaded" if former is None else "reloaded", adapter, sender)
        if former is not None:
            self._let_go(former)

    def _evict(self, adapter: LoadedAdapter) -> None:
        _note("evicted", adapter, "others")
        self._let_go(self._loaded.pop(adapter.name))

    def _let_go(self, adapter: LoadedAdapter) -> None:
        """Remove an adapter from the host as soon as nobody uses it."""
        if adapter.users:
            self._leaving.append(adapter)
        else:
            self._remove(adapter)

    def _remove(self, adapter: LoadedAdapter) -> None:
        removed = self.host.adapter(adapter.host_name)
        self.host.remove(adapter.host_name)
        self.on_removed(removed)


def _note(event: str, adapter: LoadedAdapter, sender: str) -> None:
    _log.info(
        "adapter %s: %s, revision %s, by %s", shown(adapter.name), event, adapter.revision, sender
    )


def unknown_model(name: str) -> RequestError:
    return RequestError(f"the model {shown(name)} does not exist", "model_not_found", param="model")


def _no_place(fault: str) -> RequestError:
    advice = "retry later, or start the server with a larger --max-adapters"
    return RequestError(f"{fault}; {advice}", "queue_full")


def _broken(name: str) -> RequestError:
    message = f"the adapter {shown(name)} cannot be loaded; see the server's log"
    return RequestError(message, "broken_adapter")
