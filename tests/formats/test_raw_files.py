"""A crash in the middle of writing leaves the old adapter, the new one, or none; never a mix."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError, FormatError
from loraloom.formats import raw_files, read_adapter
from loraloom.formats.files import read_stored
from tests.formats import test_axolotl
from tests.formats.tiny import (
    assert_same_tensors,
    make_tensors,
    write,
)

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(("function", "call"), [("write_safetensors", 0), ("sync", 0), ("sync", 2)])
def test_a_save_that_fails_aside_leaves_the_old_adapter(
    function, call, base, tmp_path, monkeypatch
):
    write(tmp_path, base, OLD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kill_at(monkeypatch, raw_files, function, call)
    with pytest.raises(KilledError):
        write(tmp_path, base, SAME_SHAPES, 1, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_under_an_unchanged_config_there_is_always_an_adapter(renames, base, tmp_path, monkeypatch):
    tensors = write(tmp_path, base, OLD)
    kill_at(monkeypatch, os, "replace", renames)
    with pytest.raises(KilledError):
        write(tmp_path, base, OLD, 1, overwrite=True)
    tensors = make_tensors(OLD, base, 1) if renames else tensors
    assert_same_tensors(read_adapter(tmp_path, base)[1], tensors)


def read_between(monkeypatch, read) -> list:
    """Read an adapter before and after each rename and deletion of a writer: what comes of it."""
    outcomes = []

    def outcome():
        try:
            return read()
        except FormatError as error:
            return str(error).partition(" has ")[2].partition(" (")[0]

    def observed(operation):
        def observed_operation(*arguments, **options):
            outcomes.append(outcome())
            operation(*arguments, **options)
            outcomes.append(outcome())

        return observed_operation

    monkeypatch.setattr(raw_files, "_WAITS_S", ())
    monkeypatch.setattr(os, "replace", observed(os.replace))
    monkeypatch.setattr(Path, "unlink", observed(Path.unlink))
    return outcomes


def test_a_reader_meets_the_old_adapter_the_new_one_or_none(base, tmp_path, monkeypatch):
    old = write(tmp_path, base, LoraConfig(rank=2, alpha=4))
    name = next(iter(old))

    def read() -> float:
        config, tensors = read_adapter(tmp_path, base)
        assert config.alpha == (4 if torch.equal(tensors[name], old[name]) else 64)
        return config.alpha

    outcomes = read_between(monkeypatch, read)
    write(tmp_path, base, LoraConfig(rank=2, alpha=64), 1, overwrite=True)
    assert [*dict.fromkeys(outcomes)] == [4, "no adapter_config.json", 64]


def test_files_that_are_replaced_between_two_reads_are_read_again(base, tmp_path, monkeypatch):
    write(tmp_path, base, LoraConfig(rank=2, alpha=4))
    read, news = raw_files._read_safetensors, []

    def replaced_before(path):
        if not news:
            news.append(write(tmp_path, base, LoraConfig(rank=2, alpha=64), 1, overwrite=True))
        return read(path)

    monkeypatch.setattr(raw_files, "_read_safetensors", replaced_before)
    config, tensors = read_adapter(tmp_path, base)
    assert config.alpha == 64
    assert_same_tensors(tensors, news[0])


def test_what_lies_beside_a_new_adapter_is_not_read_with_it(base, tmp_path, monkeypatch):
    def read() -> str:
        return read_stored(tmp_path).config.title

    test_axolotl.write(tmp_path)
    outcomes = read_between(monkeypatch, read)
    write(tmp_path, base, LoraConfig(rank=2), overwrite=True)
    assert [*dict.fromkeys(outcomes)] == ["MixLoRA", "no adapter_config.json", "LoRA"]
    monkeypatch.undo()
    (tmp_path / raw_files.SIDECAR_WEIGHTS).write_text("of another adapter")
    assert read() == "LoRA"


def test_equal_adapters_are_equal_files_in_every_process(base, tmp_path):
    command = "from tests.formats.tiny import *; import sys; write(sys.argv[1], llama_base())"
    subprocess.run([sys.executable, "-c", command, tmp_path / "a"], cwd=ROOT, check=True)
    for name in "bcde":
        write(tmp_path / name, base)
        for path in (tmp_path / name).iterdir():
            assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_what_is_written_is_what_the_library_reads(tmp_path):
    tensors = {"wide": torch.randn(2, 3, dtype=torch.float64).T, "ä": torch.randn(7).bfloat16()}
    tensors |= {"half": torch.ones(3).half(), "none": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    metadata = {"format": "pt", "z": '"', "a": "ß\n"}
    path = tmp_path / "a.safetensors"
    raw_files.write_safetensors(path, tensors, tensors.values(), metadata)
    assert_same_tensors(load_file(path), tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata


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

    monkeypatch.setattr(raw_files, "write_safetensors", full)
    with pytest.raises(AdapterError, match=r"can't be written to .*No space left"):
        write(tmp_path / "a", base, OLD)
