"""Which adapters are on the host, and when they come and go."""

import asyncio
import hashlib
import logging
import os
import shutil
import threading
from collections import Counter
from contextlib import asynccontextmanager
from functools import wraps
from itertools import cycle

import pytest
import torch
from safetensors.torch import save_file

from loraloom.errors import ConfigError
from loraloom.generation.engine import Engine
from loraloom.generation.request import RequestError
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.host import Host
from loraloom.serve.adapter_cache import ServedAdapters
from loraloom.serve.http.exchange import Backend
from tests.tiny import METHODS, tiny_host


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of four adapters, and something else."""
    directory = tmp_path_factory.mktemp("adapters")
    host = tiny_host()
    for name in METHODS:
        host.save(name, directory / name)
    (directory / "notes").mkdir()
    return directory


@pytest.fixture
def host():
    return tiny_host(configs={"own": METHODS["lora"]})


def in_loop(test):
    @wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


@asynccontextmanager
async def using(adapters, name, tenant=""):
    adapter = await adapters.acquire(name, tenant)
    yield adapter.adapters[0].host_name
    adapters.release(adapter)


async def asked(adapters, name, tenant=""):
    """A request that waits."""
    num_waiting = adapters.num_waiting
    task = asyncio.create_task(adapters.acquire(name, tenant))
    while adapters.num_waiting == num_waiting and not task.done():
        await asyncio.sleep(0.001)
    return task


@in_loop
async def test_the_one_that_was_not_used_for_longest_goes(host, saved):
    gone = []
    adapters = ServedAdapters(host, "base", saved, max_lazy=2, on_removed=gone.append)
    assert set(await adapters.names()) == {"own", *METHODS}
    assert list(host.adapters) == ["own"]
    for name in ("lora", "dora", "lora", "mixlora"):
        async with using(adapters, name) as host_name:
            assert host_name in host.adapters
    assert set(host.adapters) == {"own", "lora", "mixlora"}
    assert [adapter.name for adapter in gone] == ["dora"]


@in_loop
async def test_adapters_in_use_stay_and_others_wait_for_their_places(host, saved):
    adapters = ServedAdapters(host, "base", saved, max_lazy=1, max_waiting=3)
    async with using(adapters, "lora"):
        first, second = await asked(adapters, "dora"), await asked(adapters, "mixlora")
        assert await adapters.take(["lora"]) is None  # it is the next one's turn
        third = await asked(adapters, "lora")
        assert set(host.adapters) == {"own", "lora"}
        with pytest.raises(RequestError, match="3 requests wait for adapters that are not loaded"):
            await adapters.acquire("dora")
    for name, waiting in (("dora", first), ("mixlora", second), ("lora", third)):
        adapter = await waiting
        assert set(host.adapters) == {"own", name}
        adapters.release(adapter)
    assert adapters.num_waiting == 0


@in_loop
async def test_requests_that_are_abandoned_take_no_place(host, saved, monkeypatch):
    adapters = ServedAdapters(host, "base", saved, max_lazy=1)
    async with using(adapters, "lora"):
        gone, other = await asked(adapters, "dora"), await asked(adapters, "mixlora")
        gone.cancel()
    adapters.release(await other)
    assert set(host.adapters) == {"own", "mixlora"}
    real, go_on = host.load, threading.Event()
    monkeypatch.setattr(host, "load", lambda *files: go_on.wait(30) and real(*files))
    gone = await asked(adapters, "dora")
    await asyncio.sleep(0.05)  # until it is being loaded
    gone.cancel()
    await asyncio.sleep(0)
    other = await asked(adapters, "lora")
    go_on.set()
    adapters.release(await other)
    assert set(host.adapters) == {"own", "lora"}


@in_loop
async def test_adapters_follow_their_files(host, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved, directory := tmp_path / "mine")
    adapters = ServedAdapters(host, "base", directory)
    await adapters.load("named", "~/mine/lora")
    for name in ("lora", "named"):
        async with using(adapters, name) as old:
            before = host.adapters[old]
            (directory / "lora" / "train.log").write_text(name)  # none of its files
            async with using(adapters, name) as same:
                assert same == old
            shutil.copytree(saved / "dora", directory / "lora", dirs_exist_ok=True)
            (directory / "lora" / "adapter_config.json").touch()
            async with using(adapters, name) as new:
                assert host.adapters[new].config.weight_decomposition
            assert host.adapters[old] is before
    shutil.rmtree(directory / "lora")
    for name in ("lora", "named"):
        with pytest.raises(RequestError, match=f"the model '{name}' does not exist"):
            await adapters.acquire(name)
        assert name not in await adapters.names()
    assert set(host.adapters) == {"own"}


@in_loop
async def test_a_hub_out_of_reach_delays_nobody(host, saved, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(
        "loraloom.serve.adapter_cache.find_adapter", lambda source: released.wait(30)
    )
    adapters = ServedAdapters(host, "base", saved)
    loading = asyncio.create_task(adapters.load("a", "far/away"))
    async with using(adapters, "lora") as name:
        assert name in host.adapters
    assert not loading.done()
    loading.cancel()
    monkeypatch.setattr("loraloom.serve.adapter_cache.DOWNLOAD_S", 0.05)
    # more than the event loop has threads
    far = [adapters.load(f"a{place}", "far/away") for place in range(40)]
    late = asyncio.gather(*far, return_exceptions=True)
    async with using(adapters, "dora") as name:
        assert name in host.adapters
    for error in await late:
        assert isinstance(error, RequestError)
        assert "'far/away' was not downloaded in 0.05 seconds; retry" in str(error)
        assert error.code == "timeout"
    released.set()


@in_loop
async def test_an_adapter_that_is_unloaded_or_loaded_again_stays_for_those_that_use_it(host, saved):
    adapters = ServedAdapters(host, "base")
    await adapters.load("a", str(saved / "lora"))
    async with using(adapters, "a") as old:
        await adapters.load("a", str(saved / "mixlora"), replace=True)
        async with using(adapters, "a") as new:
            assert host.adapters[old].config != host.adapters[new].config
            await adapters.unload("a")
            assert {old, new} < set(host.adapters)
        with pytest.raises(RequestError, match="the model 'a' does not exist"):
            await adapters.acquire("a")
    assert set(host.adapters) == {"own"}


@pytest.mark.parametrize("name", ["../lora", "lora/../lora", "notes", "", ".", "nobody"])
def test_names_that_lead_elsewhere_do_not_exist(host, saved, name):
    with pytest.raises(RequestError, match="does not exist"):
        asyncio.run(ServedAdapters(host, "base", saved).acquire(name))


@in_loop
async def test_the_base_model_has_no_experts(host, tiny_tokenizer):
    engine = Engine(host, tiny_tokenizer, EngineLimits(max_rows=1, cache_tokens=64))
    backend = Backend(engine, ServedAdapters(host, "base"), tiny_tokenizer)
    for model in ("base/law", "base/law:0.5"):
        with pytest.raises(RequestError, match=f"'{model}' does not exist"):
            await backend.acquire(model)


@in_loop
async def test_experts_of_one_adapter_share_its_place(host, saved):
    adapters = ServedAdapters(host, "base", saved, max_lazy=1)
    of_one = await adapters.acquire_sum(["lora", "lora"])
    assert [member.host_name for member in of_one.adapters] == ["lora", "lora"]
    with pytest.raises(RequestError, match=r"a sum may have 1 adapters .* got lora, dora"):
        await adapters.acquire_sum(["lora", "dora", "lora"])


@in_loop
async def test_names_that_are_taken_or_unsafe_are_refused(host, saved):
    adapters = ServedAdapters(host, "base", saved)
    loads = [adapters.load("new", str(saved / name)) for name in ("lora", "dora")]
    outcomes = await asyncio.gather(*loads, return_exceptions=True)
    (refused,) = [one for one in outcomes if one is not None]  # whichever was found later
    assert "the name 'new' is taken" in str(refused)
    for name in ("own", "base", "dora"):
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
            await adapters.load(name, str(saved / "lora"))
    with pytest.raises(ConfigError, match="'dora' is in --adapter-dir; to remove it, delete"):
        await adapters.unload("dora")
    with pytest.raises(ConfigError, match="safe file name"):
        await adapters.load("../x", str(saved / "lora"))


class FakeHost(Host):
    """A host that computes nothing."""

    def __init__(self):
        self._fakes = {}

    @property
    def adapters(self):
        return self._fakes

    def load(self, name, path_or_hub_id, settings=None):
        self._fakes[name] = object()

    def adapter(self, name):
        return self._fakes[name]

    def remove(self, name):
        del self._fakes[name]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A directory of adapters that only a fake host can load."""
    directory = tmp_path_factory.mktemp("many")
    for number in range(64):
        (directory / f"a{number}").mkdir()
        (directory / f"a{number}" / "adapter_config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("milliseconds", [0, 8])
@pytest.mark.parametrize("places", [2, 3, 8])
@in_loop
async def test_tenants_that_always_want_other_adapters_load_as_many(many, places, milliseconds):
    adapters = ServedAdapters(FakeHost(), "base", many, max_lazy=places)
    loads = Counter()
    numbers = {"a": cycle(range(40)), "b": cycle(range(40, 64))}

    async def ask(tenant):
        while loads.total() < 200:
            async with using(adapters, f"a{next(numbers[tenant])}", tenant):
                loads[tenant] += loads.total() < 200
                await asyncio.sleep(milliseconds / 1000)

    await asyncio.gather(*(ask(tenant) for tenant in "a" * 30 + "b" * 12))
    assert loads["a"] == pytest.approx(loads["b"], rel=0.1)


@in_loop
async def test_a_tenant_without_a_place_loads_one_adapter_more_than_there_are(many):
    host = FakeHost()
    adapters = ServedAdapters(host, "base", many, max_lazy=2)
    held = [await adapters.acquire(f"a{number}", "greedy") for number in range(2)]
    greedy = await asked(adapters, "a2", "greedy")
    first = await adapters.acquire("a3", "modest")
    second = await asked(adapters, "a4", "modest")
    await asyncio.sleep(0.05)
    assert set(host.adapters) == {"a0", "a1", "a3"}
    for served in held:
        assert {greedy.done(), second.done()} == {False}
        adapters.release(served)
        await asyncio.sleep(0.05)
    assert set(host.adapters) == {"a2", "a3"}  # an equal part for each
    adapters.release(first)
    for task in (second, greedy):
        adapters.release(await task)
    assert len(host.adapters) == 2


@in_loop
async def test_a_tenant_whose_requests_fill_the_line_keeps_nobody_out(many):
    adapters = ServedAdapters(FakeHost(), "base", many, max_lazy=1, max_waiting=4)
    held = [await adapters.acquire(f"a{number}", str(number)) for number in range(2)]
    tasks = [await asked(adapters, f"a{number}", "0") for number in range(2, 6)]
    with pytest.raises(RequestError, match="4 requests wait for adapters"):
        await adapters.acquire("a6", "0")
    tasks += [await asked(adapters, f"a{number}", "1") for number in range(7, 9)]
    with pytest.raises(RequestError, match="2 requests wait for adapters"):
        await adapters.acquire("a9", "1")
    for served in held:
        adapters.release(served)
    for task in asyncio.as_completed(tasks):
        adapters.release(await task)
    assert adapters.num_waiting == 0


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """A directory of adapters, each with the bytes of its name."""
    directory = tmp_path_factory.mktemp("sized")
    for name in ("100-a", "100-b", "100-c", "100-d", "100-e", "200-a", "300-a", "304-a"):
        (directory / name).mkdir()
        (directory / name / "adapter_config.json").write_text("{}")
        num_weights = int(name.partition("-")[0]) // 4  # which take 4 bytes on the host
        weights = {"w": torch.zeros(num_weights, dtype=torch.bfloat16)}
        save_file(weights, directory / name / "adapter_model.safetensors")
    return directory


@in_loop
async def test_unused_adapters_leave_for_others_that_need_their_bytes(sized):
    host = FakeHost()
    adapters = ServedAdapters(host, "base", sized, max_bytes=300)
    for name in ("100-a", "100-b", "100-c", "100-a"):
        async with using(adapters, name):
            pass
    assert set(host.adapters) == {"100-a", "100-b", "100-c"}
    async with using(adapters, "200-a"):
        assert set(host.adapters) == {"100-a", "200-a"}
    async with using(adapters, "300-a"):
        assert set(host.adapters) == {"300-a"}
    with pytest.raises(RequestError, match=r"'304-a' takes 304 bytes, .* leaves 300; start"):
        await adapters.acquire("304-a")
    with pytest.raises(RequestError, match=r"'200-a' \+ '304-a' takes 504 bytes"):
        await adapters.acquire_sum(["200-a", "304-a"])
    assert set(host.adapters) == {"300-a"}


@in_loop
async def test_adapters_that_were_named_take_bytes_of_those_of_the_directory(sized):
    host = FakeHost()
    adapters = ServedAdapters(host, "base", sized, max_bytes=300)
    async with using(adapters, "100-a"), using(adapters, "200-a"):
        await adapters.load("mine", str(sized / "100-b"))
    assert set(host.adapters) == {"100-a", "mine"} or set(host.adapters) == {"200-a", "mine"}
    with pytest.raises(
        RequestError, match=r"'300-a' takes 300 bytes, but .* leaves 200;"
    ) as caught:
        await adapters.acquire("300-a")
    assert caught.value.code == "adapter_memory"
    with pytest.raises(RequestError, match="'more' takes 300 bytes"):
        await adapters.load("more", str(sized / "300-a"))
    await adapters.load("mine", str(sized / "300-a"), replace=True)
    assert set(host.adapters) == {"mine.2"}


@in_loop
async def test_a_key_whose_adapters_fill_the_bytes_keeps_nobody_out(sized):
    host = FakeHost()
    adapters = ServedAdapters(host, "base", sized, max_bytes=200)
    held = [await adapters.acquire(name, "greedy") for name in ("100-a", "100-b")]
    greedy = await asked(adapters, "100-c", "greedy")
    first = await adapters.acquire("200-a", "modest")
    second = await asked(adapters, "100-d", "modest")
    assert set(host.adapters) == {"100-a", "100-b", "200-a"}
    for served in held:
        adapters.release(served)
    adapters.release(await greedy)
    adapters.release(first)
    adapters.release(await second)
    assert set(host.adapters) == {"100-d"}  # the one more has left


@in_loop
async def test_a_large_adapter_waits_for_no_small_ones_that_come_later(sized):
    adapters = ServedAdapters(FakeHost(), "base", sized, max_bytes=300)
    held = {name: await adapters.acquire(name) for name in ("100-a", "100-b", "100-c")}
    large = await asked(adapters, "200-a")
    late = [await asked(adapters, name) for name in ("100-d", "100-e")]
    again = await asked(adapters, "100-a")  # whose bytes the large one gets
    for name in ("100-a", "100-b"):
        assert not large.done()
        adapters.release(held[name])
        await asyncio.sleep(0.05)
    assert (large.done(), *(task.done() for task in late)) == (True, False, False)
    for served in (held["100-c"], await large):
        adapters.release(served)
    for task in (*late, again):
        adapters.release(await task)


@in_loop
async def test_an_old_adapter_answers_until_new_files_can_be_read(host, saved, tmp_path, caplog):
    caplog.set_level(logging.INFO, "loraloom")
    shutil.copytree(saved / "lora", directory := tmp_path / "up")
    adapters = ServedAdapters(host, "base", tmp_path)
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"

    async def name_on_host():
        async with using(adapters, "up") as name:
            return name

    assert await name_on_host() == "up"
    whole = weights.read_bytes()
    for size in (100, 100, len(whole) // 2):
        weights.write_bytes(whole[:size])
        os.utime(weights, ns=(size, size))
        assert await name_on_host() == "up"
    assert caplog.text.count("adapter 'up' can't be loaded") == 2
    text = config.read_text()
    config.unlink()  # as a writer does for a moment
    assert await name_on_host() == "up"
    assert "up" in await adapters.names()
    weights.write_bytes(whole)
    config.write_text(text)
    assert await name_on_host() != "up"
    assert "adapter 'up': reloaded, revision" in caplog.text


@in_loop
async def test_an_adapter_that_is_broken_is_read_once_until_its_files_change(
    host, saved, tmp_path, caplog
):
    shutil.copytree(saved / "lora", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    adapters = ServedAdapters(host, "base", tmp_path)
    for _ in range(3):
        with pytest.raises(RequestError, match="'cut' cannot be loaded") as caught:
            await adapters.acquire("cut")
        assert caught.value.code == "broken_adapter"
    (record,) = caplog.records
    assert str(weights) in record.getMessage()
    assert record.exc_info is None
    weights.write_bytes(whole)
    async with using(adapters, "cut") as name:
        assert name in host.adapters


@in_loop
async def test_the_ways_to_upgrade_an_adapter_work(host, saved, tmp_path):
    served, versions = tmp_path / "adapters", tmp_path / "versions"
    served.mkdir()
    for version in ("lora", "dora"):
        shutil.copytree(saved / version, versions / version)
    (served / "up").symlink_to(versions / "lora")
    adapters = ServedAdapters(host, "base", served)

    async def is_dora():
        async with using(adapters, "up") as name:
            return host.adapters[name].config.weight_decomposition

    assert not await is_dora()
    (served / ".new").symlink_to(versions / "dora")
    shutil.copytree(versions / "lora", served / ".copy")
    assert "up" in await adapters.names()
    assert not {".new", ".copy"} & set(await adapters.names())
    os.replace(served / ".new", served / "up")
    assert await is_dora()
    tiny_host().save("lora", served / "up", overwrite=True)
    assert not await is_dora()


@in_loop
async def test_the_log_says_which_adapters_come_and_go_and_by_whom(host, saved, caplog):
    caplog.set_level(logging.INFO, "loraloom")
    adapters = ServedAdapters(host, "base", saved, max_lazy=1)
    for name in ("lora", "dora"):
        async with using(adapters, name):
            pass
    await adapters.load("new", str(saved / "lora"), sender="key 1a2b3c4d")
    await adapters.unload("new", "key 1a2b3c4d")
    files = [saved / "lora" / f"adapter_{name}" for name in ("config.json", "model.safetensors")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if digest in line] == [
        f"adapter 'lora': loaded, revision {digest}, by its directory",
        f"adapter 'lora': evicted, revision {digest}, by others",
        f"adapter 'new': loaded, revision {digest}, by key 1a2b3c4d",
        f"adapter 'new': unloaded, revision {digest}, by key 1a2b3c4d",
    ]
