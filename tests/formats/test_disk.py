"""A crash in the middle of writing leaves the old adapter, the new one, or none; never a mix."""

from __future__ import annotations

import os

import pytest

from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError, FormatError
from loraloom.formats import disk, read_adapter
from tests.formats.tiny import assert_same_tensors, make_tensors, write

OLD = LoraConfig(rank=2, alpha=2)
SAME_SHAPES = LoraConfig(rank=2, alpha=4)


class KilledError(Exception):
    """Stands for the end of the process."""


def kill_at(monkeypatch, module, function: str, call: int) -> None:
    """Raise instead of the given call (from 0) to a function of a module."""
    original, calls = getattr(module, function), []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) > call:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, killed)


@pytest.mark.parametrize(("function", "call"), [("save_file", 0), ("sync", 0), ("sync", 2)])
def test_a_save_that_fails_aside_leaves_the_old_adapter(
    function, call, base, tmp_path, monkeypatch
):
    write(tmp_path, base, OLD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kill_at(monkeypatch, disk, function, call)
    with pytest.raises(KilledError):
        write(tmp_path, base, SAME_SHAPES, 1, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_new_weights_are_never_seen_under_the_old_config(renames, base, tmp_path, monkeypatch):
    write(tmp_path, base, OLD)
    kill_at(monkeypatch, os, "replace", renames)
    with pytest.raises(KilledError):
        write(tmp_path, base, SAME_SHAPES, 1, overwrite=True)
    with pytest.raises(FormatError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path, base)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_under_an_unchanged_config_there_is_always_an_adapter(renames, base, tmp_path, monkeypatch):
    tensors = write(tmp_path, base, OLD)
    kill_at(monkeypatch, os, "replace", renames)
    with pytest.raises(KilledError):
        write(tmp_path, base, OLD, 1, overwrite=True)
    tensors = make_tensors(OLD, base, 1) if renames else tensors
    assert_same_tensors(read_adapter(tmp_path, base)[1], tensors)


def test_what_a_killed_process_has_left_aside_is_cleared(base, tmp_path):
    aside, busy = tmp_path / ".0123456789abcdef.writing", tmp_path / ".123456789abcdef0.writing"
    for directory in (aside, busy):
        directory.mkdir()
        (directory / "adapter_model.safetensors").write_text("half")
    os.utime(aside, (0, 0))
    tensors = write(tmp_path, base, OLD)
    assert not aside.exists()
    assert busy.exists(), "another process may be writing"
    assert_same_tensors(read_adapter(tmp_path, base)[1], tensors)


def test_a_system_that_can_not_write_is_one_clear_error(base, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(AdapterError, match=r"can't be written to .*No space left"):
        write(tmp_path / "a", base, OLD)
