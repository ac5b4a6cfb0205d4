"""Adapters of every method, broken: their configurations, their weights and what is in those."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.formats import describe, read_adapter, write_adapter
from tests.formats.tiny import llama_base, make_tensors
from tests.fuzz.harness import EXTREMES, broken_bytes, fuzz, mutated, survives
from tests.tiny import ALL_METHODS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on sparse tensors

BASE = llama_base()
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "not a number": lambda tensor: tensor * float("nan"),
    "float64": lambda tensor: tensor.double(),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "whole numbers": lambda tensor: tensor.to(torch.int64),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "flat": lambda tensor: tensor.flatten(),
    "empty": lambda tensor: tensor[:0],
    "one row": lambda tensor: tensor[:1],
    "no axis": lambda tensor: tensor.sum(),
}
IN_A_PICKLE: dict[str, Callable[[Tensor], Any]] = TENSORS | {
    "sparse": lambda tensor: tensor.to_sparse(),
    "rows, compressed": lambda tensor: tensor.reshape(len(tensor), -1).to_sparse_csr(),
    "without data": lambda tensor: tensor.to("meta"),
    "expanded": lambda tensor: torch.zeros(1).expand(10**6, 10**6),
    "a view": lambda tensor: tensor.flip(0).T if tensor.dim() == 2 else tensor[::2],
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "a list": lambda tensor: tensor.tolist(),
    "a text": lambda tensor: "tensor",
}
NAMES = st.sampled_from(
    ["x", "", "a\x1b[31m", "layers." + "9" * 5000, "experts.٣", ".".join(["a"] * 2000)]
) | st.text(max_size=30).filter(lambda name: name != "__metadata__" and "\0" not in name)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    """An adapter of each method, in a directory of its name."""
    place = tmp_path_factory.mktemp("valid")
    for method, config in ALL_METHODS.items():
        write_adapter(place / method, config, make_tensors(config, BASE), BASE)
    return place


def broken_config(draw: st.DrawFn, directory: Path) -> None:
    path = directory / CONFIG
    if draw(st.integers(0, 3)) == 0:
        path.write_bytes(draw(broken_bytes(path.read_bytes())))
    else:
        path.write_text(json.dumps(draw(mutated(json.loads(path.read_text())))))


def broken_weights(draw: st.DrawFn, directory: Path) -> None:
    path = directory / (WEIGHTS if (directory / WEIGHTS).exists() else PICKLE)
    path.write_bytes(draw(broken_bytes(path.read_bytes())))


def broken_record(draw: st.DrawFn, directory: Path) -> None:
    """Break what stands in the header of the weights."""
    path = directory / WEIGHTS
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata().get("loraloom", '{"version": 1, "base": {}}'))
    text = json.dumps(draw(mutated(record)))
    save_file(load_file(path), path, metadata={"loraloom": text})


def broken_tensors(draw: st.DrawFn, directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    _change(draw, tensors, TENSORS)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / WEIGHTS)


def broken_pickle(draw: st.DrawFn, directory: Path) -> None:
    tensors: dict[Any, Any] = dict(load_file(directory / WEIGHTS))
    (directory / WEIGHTS).unlink()
    _change(draw, tensors, IN_A_PICKLE)
    legacy = draw(st.integers(0, 4)) == 0
    try:
        torch.save(tensors, directory / PICKLE, _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, NotImplementedError, AttributeError):  # torch itself can't save it so
        torch.save({}, directory / PICKLE)


def _change(draw: st.DrawFn, tensors: dict[Any, Any], kinds: dict[str, Any]) -> None:
    """Change, drop, rename or add a few tensors."""
    names = draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True))
    for name in names:
        match draw(st.sampled_from(["change", "change", "drop", "rename", "add"])):
            case "change":
                kind = kinds[draw(st.sampled_from(sorted(kinds)))]
                tensors[name] = kind(tensors[name])
            case "drop" if len(tensors) > 1:
                del tensors[name]
            case "rename":
                tensors[draw(NAMES)] = tensors.pop(name)
            case "add":
                tensors[draw(NAMES)] = torch.zeros(draw(st.integers(0, 3)), 2)


BREAKS = (broken_config, broken_record, broken_tensors, broken_pickle, broken_weights)
"""In this order; the last one may leave nothing that the others can read."""


@st.composite
def directories(draw: st.DrawFn, valid: Path, place: Path) -> Path:
    """An adapter that is broken in one way or two."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(valid / draw(st.sampled_from(sorted(ALL_METHODS))), place)
    breaks = draw(st.lists(st.sampled_from(BREAKS), min_size=1, max_size=2, unique=True))
    for change in sorted(breaks, key=BREAKS.index):
        change(draw, place)
    return place


@fuzz
@given(st.data())
def test_a_broken_adapter_is_read_or_refused(valid, tmp_path, data):
    directory = data.draw(directories(valid, tmp_path / "a"))
    survives(lambda: read_adapter(directory, BASE), tmp_path)
    survives(lambda: describe(directory), tmp_path)


@fuzz
@given(path=st.text() | EXTREMES.map(str) | st.sampled_from(["a/" * 3000, "owner/\x1b[31m"]))
def test_any_path_is_no_adapter(path, monkeypatch):
    monkeypatch.setattr("loraloom.formats.hub.snapshot_download", _no_hub)
    monkeypatch.setattr("loraloom.formats.hub._listed", lambda hub_id: [])
    monkeypatch.setenv("HOME", tempfile.gettempdir())
    assert survives(lambda: read_adapter(path, BASE)) is not None


def _no_hub(name: str, allow_patterns: list[str]) -> str:
    raise OSError("no hub here")
