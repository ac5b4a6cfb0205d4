"""Which adapters are on the host, and when they come and go."""

import asyncio
import shutil
import threading
from contextlib import asynccontextmanager
from functools import wraps

import pytest

from loraloom.errors import ConfigError
from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from loraloom.generation.sequence import RequestError
from loraloom.serve.adapters import ServedAdapters
from loraloom.serve.http.bridge import Backend
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
async def using(adapters, name):
    adapter = await adapters.acquire(name)
    yield adapter.host_name
    adapters.release(adapter)


async def asked(adapters, name):
    """A request that waits."""
    task = asyncio.create_task(adapters.acquire(name))
    await asyncio.sleep(0)
    return task


@in_loop
async def test_the_one_that_was_not_used_for_longest_goes(host, saved):
    gone = []
    adapters = ServedAdapters(host, "base", saved, max_lazy=2, on_removed=gone.append)
    assert set(adapters.names()) == {"own", *METHODS}
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
        assert adapters.take("lora") is None  # it is the next one's turn
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
        assert name not in adapters.names()
    assert set(host.adapters) == {"own"}


@in_loop
async def test_a_hub_out_of_reach_delays_nobody(host, saved, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr("loraloom.serve.adapters.find_adapter", lambda source: released.wait(30))
    adapters = ServedAdapters(host, "base", saved)
    loading = asyncio.create_task(adapters.load("a", "far/away"))
    async with using(adapters, "lora") as name:
        assert name in host.adapters
    assert not loading.done()
    loading.cancel()
    monkeypatch.setattr("loraloom.serve.adapters.DOWNLOAD_S", 0.05)
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
            adapters.unload("a")
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
    assert [member.host_name for member in of_one.members] == ["lora", "lora"]
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
        adapters.unload("dora")
    with pytest.raises(ConfigError, match="safe file name"):
        await adapters.load("../x", str(saved / "lora"))


@in_loop
async def test_adapters_fit_the_memory_that_they_may_take(host, saved):
    own = host.adapters["own"]  # a LoRA as that of the directory
    size = sum(one.numel() * one.element_size() for one in own.state_dict().values())
    adapters = ServedAdapters(host, "base", saved, max_bytes=7 * size // 2)
    async with using(adapters, "lora"):
        await adapters.load("more", str(saved / "lora"))
        with pytest.raises(RequestError, match="'late' does not fit next to those in use"):
            await adapters.load("late", str(saved / "lora"))
        assert set(host.adapters) == {"own", "lora", "more"}
    await adapters.load("late", str(saved / "lora"))  # in place of the one that nobody uses now
    assert set(host.adapters) == {"own", "more", "late"}
    await adapters.load("late", str(saved / "lora"), replace=True)  # not counted beside itself
    assert set(host.adapters) == {"own", "more", "late.2"}
