"""Control groups as Linux lays them out, made up in a directory."""

from __future__ import annotations

import pytest

from loraloom.training.run import memory
from loraloom.training.run.container import container_bytes_left

GIB = 2**30


def write(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


def v2(directory, limit, usage, inactive=0):
    write(
        directory,
        memory__max=limit,
        memory__current=usage,
        memory__stat=f"anon 5\ninactive_file {inactive}\nactive_file 7",
    )


def v1(directory, limit, usage, inactive=0):
    write(
        directory,
        memory__limit_in_bytes=limit,
        memory__usage_in_bytes=usage,
        memory__stat=f"inactive_file 3\ntotal_inactive_file {inactive}",
    )


@pytest.fixture
def left(tmp_path):
    def ask(own):
        (tmp_path / "own").write_text(own)
        return container_bytes_left(tmp_path / "groups", tmp_path / "own")

    return ask


def test_version_2_counts_the_limit_less_what_is_used_for_good(left, tmp_path):
    v2(tmp_path / "groups/job", limit=4 * GIB, usage=3 * GIB, inactive=GIB)
    assert left("0::/job\n") == 2 * GIB


def test_a_group_above_counts_too(left, tmp_path):
    v2(tmp_path / "groups/slice/job", limit="max", usage=GIB)
    v2(tmp_path / "groups/slice", limit=2 * GIB, usage=GIB)
    assert left("0::/slice/job\n") == GIB


def test_version_1_is_known(left, tmp_path):
    v1(tmp_path / "groups/memory/docker/a", limit=4 * GIB, usage=GIB, inactive=GIB)
    own = "12:cpu,cpuacct:/docker/a\n5:memory:/docker/a\n1:name=systemd:/\n"
    assert left(own) == 4 * GIB


def test_a_group_that_is_only_seen_as_the_root_is_found(left, tmp_path):
    """The path of a container's group on its host means nothing inside the container."""
    v1(tmp_path / "groups/memory", limit=GIB, usage=GIB // 4)
    assert left("5:memory:/docker/0123\n") == GIB - GIB // 4


@pytest.mark.parametrize("own", ["", "0::/\n", "0::/job\n", "5:memory:/\n"])
def test_without_a_limit_there_is_none(left, tmp_path, own):
    v2(tmp_path / "groups/job", limit="max", usage=GIB)
    assert left(own) is None


def test_a_group_over_its_limit_has_nothing_left(left, tmp_path):
    v2(tmp_path / "groups", limit=GIB, usage=2 * GIB)
    assert left("0::/\n") == 0


def test_a_run_has_what_its_container_leaves(monkeypatch):
    monkeypatch.setattr(memory, "container_bytes_left", lambda: 12345)
    assert memory.available_bytes(memory.torch.device("cpu")) == 12345
    monkeypatch.setattr(memory, "container_bytes_left", lambda: None)
    assert memory.available_bytes(memory.torch.device("cpu")) > 12345
