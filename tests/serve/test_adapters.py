"""Which adapters are on the host, and when they come and go."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

from loraloom.errors import ConfigError, FormatError
from loraloom.serve.adapters import AdapterShelf, AllInUseError, UnknownModelError
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


@contextmanager
def using(shelf, name):
    adapter = shelf.acquire(name)
    yield adapter.host_name
    shelf.release(adapter)


def test_adapters_of_a_directory_are_loaded_when_they_are_asked_for(host, saved):
    shelf = AdapterShelf(host, "base", saved)
    assert set(shelf.names()) == {"own", *METHODS}
    assert list(host.adapters) == ["own"]
    with using(shelf, "dora") as name:
        assert name in host.adapters


def test_the_one_that_was_not_used_for_longest_goes(host, saved):
    gone = []
    shelf = AdapterShelf(host, "base", saved, max_lazy=2, on_removed=gone.append)
    for name in ("lora", "dora", "lora", "mixlora"):
        with using(shelf, name):
            pass
    assert set(host.adapters) == {"own", "lora", "mixlora"}
    assert [adapter.name for adapter in gone] == ["dora"]


def test_adapters_in_use_stay(host, saved):
    shelf = AdapterShelf(host, "base", saved, max_lazy=1)
    with using(shelf, "lora"), pytest.raises(AllInUseError, match="at most 1 adapters"):
        shelf.acquire("dora")
    with using(shelf, "dora"):
        assert set(host.adapters) == {"own", "dora"}


def test_unloading_waits_for_those_that_use_it(host, saved):
    shelf = AdapterShelf(host, "base")
    shelf.load("a", str(saved / "lora"))
    with using(shelf, "a") as name:
        shelf.unload("a")
        assert name in host.adapters
        with pytest.raises(UnknownModelError, match="the model 'a' does not exist"):
            shelf.acquire("a")
    assert set(host.adapters) == {"own"}


def test_an_adapter_that_is_loaded_again_is_another_one(host, saved):
    shelf = AdapterShelf(host, "base")
    shelf.load("a", str(saved / "lora"))
    with using(shelf, "a") as old:
        shelf.load("a", str(saved / "mixlora"), replace=True)
        with using(shelf, "a") as new:
            assert host.adapters[old].config != host.adapters[new].config
    assert len(host.adapters) == 2


def test_a_name_on_the_host_that_is_anothers_is_passed_over(host, saved):
    shelf = AdapterShelf(host, "base")
    for name in ("mix", "mix.2"):
        shelf.load(name, str(saved / "lora"))
    shelf.load("mix", str(saved / "mixlora"), replace=True)
    assert set(host.adapters) == {"own", "mix.2", "mix.3"}


def test_a_name_that_does_not_exist_waits_for_no_load(host, saved):
    shelf = AdapterShelf(host, "base", saved)
    with shelf._loading, pytest.raises(UnknownModelError):
        shelf.acquire("nobody")


@pytest.mark.parametrize("name", ["../lora", "lora/../lora", "notes", "", ".", "nobody"])
def test_names_that_lead_elsewhere_do_not_exist(host, saved, name):
    with pytest.raises(UnknownModelError, match="does not exist"):
        AdapterShelf(host, "base", saved).acquire(name)


def test_names_that_are_taken_or_unsafe_are_refused(host, saved):
    shelf = AdapterShelf(host, "base")
    for name in ("own", "base"):
        with pytest.raises(ConfigError, match=f"the name '{name}' is taken"):
            shelf.load(name, str(saved / "lora"))
    with pytest.raises(ConfigError, match="safe file name"):
        shelf.load("../x", str(saved / "lora"))


def test_files_that_can_not_be_used_leave_nothing(host, saved):
    shelf = AdapterShelf(host, "base")
    with pytest.raises(FormatError):
        shelf.load("a", str(saved / "notes"))
    assert list(host.adapters) == list(shelf.names()) == ["own"]


def test_a_directory_that_has_gone_has_no_adapters(host, tmp_path):
    assert list(AdapterShelf(host, "base", tmp_path / "none").names()) == ["own"]


def test_one_that_is_loaded_again_from_the_same_files_is_the_one_that_is_still_there(host, saved):
    shelf = AdapterShelf(host, "base")
    shelf.load("a", str(saved / "lora"))
    with using(shelf, "a") as old:
        shelf.unload("a")
        shelf.load("b", str(saved / "lora"))
        with using(shelf, "b") as new:
            assert new == old
    assert set(host.adapters) == {"own", "a"}
    shelf.unload("b")
    assert set(host.adapters) == {"own"}


def test_one_whose_files_have_changed_is_another_one(host, saved, tmp_path):
    shelf, directory = AdapterShelf(host, "base"), tmp_path / "mine"
    shutil.copytree(saved / "lora", directory)
    shelf.load("a", str(directory))
    with using(shelf, "a") as old:
        shelf.unload("a")
        shutil.copytree(saved / "dora", directory, dirs_exist_ok=True)
        shelf.load("a", str(directory))
        with using(shelf, "a") as new:
            assert new != old
    assert set(host.adapters) == {"own", new}
