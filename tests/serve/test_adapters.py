"""Which adapters are on the host, and when they come and go."""

from __future__ import annotations

import shutil
import threading
from contextlib import contextmanager

import pytest

from loraloom.errors import ConfigError, FormatError
from loraloom.generation.sequence import RequestError
from loraloom.serve.adapters import ServedAdapters, _bytes_of
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


def acquire(shelf, name):
    return shelf.take(name) or shelf.request(name).result(30)


@contextmanager
def using(shelf, name):
    adapter = acquire(shelf, name)
    yield adapter.host_name
    shelf.release(adapter)


def test_the_one_that_was_not_used_for_longest_goes(host, saved):
    gone = []
    shelf = ServedAdapters(host, "base", saved, max_lazy=2, on_removed=gone.append)
    for name in ("lora", "dora", "lora", "mixlora"):
        with using(shelf, name):
            pass
    assert set(host.adapters) == {"own", "lora", "mixlora"}
    assert [adapter.name for adapter in gone] == ["dora"]


def test_adapters_in_use_stay_and_others_wait_for_their_places(host, saved):
    shelf = ServedAdapters(host, "base", saved, max_lazy=1)
    with using(shelf, "lora"):
        first, second = shelf.request("dora"), shelf.request("mixlora")
        assert shelf.take("lora") is None  # it is the next one's turn
        third = shelf.request("lora")
        assert set(host.adapters) == {"own", "lora"}
    for name, waiting in (("dora", first), ("mixlora", second), ("lora", third)):
        adapter = waiting.result(30)
        assert set(host.adapters) == {"own", name}
        shelf.release(adapter)


def test_requests_that_are_abandoned_take_no_place(host, saved):
    shelf = ServedAdapters(host, "base", saved, max_lazy=1)
    with using(shelf, "lora"):
        gone, other = shelf.request("dora"), shelf.request("mixlora")
        shelf.abandon(gone)
    shelf.release(other.result(30))
    shelf.abandon(other)  # too late, which lets it go once more
    assert set(host.adapters) == {"own", "mixlora"}


def test_adapters_follow_their_files(host, saved, tmp_path):
    shutil.copytree(saved, directory := tmp_path / "mine")
    shelf = ServedAdapters(host, "base", directory)
    shelf.load("named", str(directory / "lora"))
    for name in ("lora", "named"):
        with using(shelf, name) as old:
            before = host.adapters[old]
            shutil.copytree(saved / "dora", directory / "lora", dirs_exist_ok=True)
            (directory / "lora" / "adapter_config.json").touch()
            with using(shelf, name) as new:
                assert host.adapters[new].config.weight_decomposition
            assert host.adapters[old] is before
    shutil.rmtree(directory / "lora")
    for name in ("lora", "named"):
        with pytest.raises(RequestError, match=f"the model '{name}' does not exist"):
            acquire(shelf, name)
        assert name not in shelf.names()
    assert set(host.adapters) == {"own"}


def test_a_hub_out_of_reach_delays_nobody_and_is_told(host, saved, monkeypatch):
    def never(source):
        assert source == "far/away"
        released.wait(30)

    released = threading.Event()
    monkeypatch.setattr("loraloom.serve.adapters.find_adapter", never)
    shelf = ServedAdapters(host, "base", saved, download_s=0.01)
    for _ in range(4):
        with pytest.raises(FormatError, match="'far/away' was not downloaded in 0"):
            shelf.load("a", "far/away")
    with pytest.raises(RequestError, match="at most 4 adapters are downloaded at once"):
        shelf.load("a", "far/away")
    with using(shelf, "lora") as name:
        assert name in host.adapters
    released.set()


def test_files_that_can_not_be_used_fail_those_that_wait_for_them(host, saved, tmp_path):
    shutil.copytree(saved, directory := tmp_path / "mine")
    (directory / "lora" / "adapter_model.safetensors").write_bytes(b"no")
    shelf = ServedAdapters(host, "base", directory)
    with pytest.raises(FormatError):
        acquire(shelf, "lora")
    with using(shelf, "dora"):
        assert set(host.adapters) == {"own", "dora"}


def test_unloading_waits_for_those_that_use_it(host, saved):
    shelf = ServedAdapters(host, "base")
    shelf.load("a", str(saved / "lora"))
    with using(shelf, "a") as name:
        shelf.unload("a")
        assert name in host.adapters
        with pytest.raises(RequestError, match="the model 'a' does not exist"):
            acquire(shelf, "a")
    assert set(host.adapters) == {"own"}


def test_an_adapter_that_is_loaded_again_is_another_one(host, saved):
    shelf = ServedAdapters(host, "base")
    shelf.load("a", str(saved / "lora"))
    with using(shelf, "a") as old:
        shelf.load("a", str(saved / "mixlora"), replace=True)
        with using(shelf, "a") as new:
            assert host.adapters[old].config != host.adapters[new].config
    assert len(host.adapters) == 2


@pytest.mark.parametrize("name", ["../lora", "lora/../lora", "notes", "", ".", "nobody"])
def test_names_that_lead_elsewhere_do_not_exist(host, saved, name):
    with pytest.raises(RequestError, match="does not exist"):
        acquire(ServedAdapters(host, "base", saved), name)


def test_names_that_are_taken_or_unsafe_are_refused(host, saved):
    shelf = ServedAdapters(host, "base")
    for name in ("own", "base"):
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
            shelf.load(name, str(saved / "lora"))
    with pytest.raises(ConfigError, match="safe file name"):
        shelf.load("../x", str(saved / "lora"))


def test_adapters_fit_the_memory_that_they_may_take(host, saved):
    size = _bytes_of(host.adapters["own"])  # a LoRA as that of the directory
    shelf = ServedAdapters(host, "base", saved, max_bytes=7 * size // 2)
    with using(shelf, "lora"):
        shelf.load("more", str(saved / "lora"))
        with pytest.raises(RequestError, match="'late' does not fit beside the others"):
            shelf.load("late", str(saved / "lora"))
        assert set(host.adapters) == {"own", "lora", "more"}
    shelf.load("late", str(saved / "lora"))  # in place of the one that nobody uses now
    assert set(host.adapters) == {"own", "more", "late"}
    small = ServedAdapters(host, "base", saved, max_bytes=10)
    with pytest.raises(RequestError, match="--max-adapter-bytes"):
        small.load("none", str(saved / "lora"))
