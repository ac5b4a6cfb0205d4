from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from loraloom.errors import TrainingError
from loraloom.training import store as store_module
from loraloom.training.results import JobResult
from loraloom.training.store import Checkpoint, CheckpointStore, JobRecord

RESULT = JobResult(
    job="b",
    status="finished",
    error=None,
    method="LoRA",
    base_model="tiny",
    num_parameters=1,
    steps=2,
    epochs=1.0,
    tokens=3,
    computed_tokens=4,
    padding_share=0.25,
    weights="last",
    metrics={},
    best=None,
    last_metrics={},
    data=("toy: 3 rows",),
    seconds=1.5,
    peak_memory_bytes={},
    environment={},
)
BASE = {"name": "tiny", "dtype": "float32"}


def write(store: CheckpointStore, round_number: int, **options) -> None:
    records = {"a": JobRecord({"seed": 0}, 12), "b": JobRecord({}, result=RESULT)}
    states = {"a": {"weights": torch.full((3,), float(round_number)), "step": round_number}}
    store.write(Checkpoint(round_number, 1.5, BASE, records), states, **options)


def newest_directory(store: CheckpointStore):
    return sorted(store.directory.iterdir())[-1]


def test_a_snapshot_comes_back_as_it_was(tmp_path):
    store = CheckpointStore(tmp_path / "snapshots")
    write(store, 7)
    snapshot, faults = store.newest()
    assert faults == []
    assert (snapshot.round, snapshot.seconds, snapshot.base) == (7, 1.5, BASE)
    assert (snapshot.done, snapshot.jobs["a"].metrics_bytes) == ({"b"}, 12)
    assert snapshot.load_state("a")["step"] == 7
    assert snapshot.load_state("b") is None
    assert snapshot.jobs["b"].result == RESULT


def test_the_newest_two_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    for round_number in (1, 5, 5, 9):
        write(store, round_number)
    assert len(list(tmp_path.iterdir())) == 2
    assert store.newest()[0].round == 9


def test_a_damaged_snapshot_is_none_of_those_that_are_kept(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    damaged = newest_directory(store)
    (damaged / "a.pt").unlink()
    store.newest()
    write(store, 3)
    assert not damaged.exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_none_is_newest_where_there_is_none(tmp_path):
    store = CheckpointStore(tmp_path / "snapshots")
    assert store.newest() == (None, [])
    assert not store.exists()


@pytest.mark.parametrize("damage", ["torn", "edited", "gone", "manifest", "no manifest"])
def test_a_damaged_snapshot_is_passed_over_and_named(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    directory = newest_directory(store)
    state, manifest = directory / "a.pt", directory / "manifest.json"
    if damage == "torn":
        state.write_bytes(state.read_bytes()[:-10])
    elif damage == "edited":
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "gone":
        state.unlink()
    elif damage == "manifest":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"round": 99}))
    else:
        manifest.unlink()
    snapshot, (fault,) = store.newest()
    assert snapshot.round == 1
    assert str(directory) in fault


def test_a_crash_while_writing_leaves_the_snapshot_before(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    write(store, 1)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        write(store, 2)
    snapshot, faults = store.newest()
    assert (snapshot.round, faults) == (1, [])


def test_files_are_synced_before_they_appear(tmp_path, quick_disk):
    write(CheckpointStore(tmp_path), 1)
    assert len(quick_disk) >= 4  # state, manifest, their directory, the one above


def test_a_full_disk_is_a_training_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"can't be written to .* No space left"):
        write(CheckpointStore(tmp_path), 1)


def test_snapshots_are_found_by_number(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    (tmp_path / "snapshot-000001").rename(tmp_path / "snapshot-999999")
    write(store, 2)
    assert (tmp_path / "snapshot-1000000").exists()
    assert store.newest()[0].round == 2
    write(store, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-1000001"]


def test_what_lies_beside_snapshots_is_left_alone(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    for name in ("snapshot-backup", "snapshot-000009.old", "mine"):
        shutil.copytree(tmp_path / "snapshot-000001", tmp_path / name)
    (tmp_path / "snapshot-000077").write_text("a file")
    for round_number in (2, 3, 4):
        write(store, round_number)
    assert store.newest()[0].round == 4
    store.clear()
    assert not store.exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mine", "snapshot-000009.old", "snapshot-000077", "snapshot-backup"]


@pytest.mark.parametrize(
    "change",
    [
        ["jobs"],
        {"jobs": []},
        {"jobs": {"a": []}},
        {"jobs": {"a": {"settings": 3}}},
        {"jobs": {"../a": {"settings": {}, "sha256": "0"}}},
        {"jobs": {"a": {"settings": {}, "scheduler_pass": math.inf}}},
        {"round": "seven"},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_manifest_of_something_else_is_passed_over(tmp_path, change):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    manifest = tmp_path / "snapshot-000001/manifest.json"
    body = json.loads(manifest.read_text())
    del body["checksum"]
    body = body | change if isinstance(change, dict) else change
    if isinstance(body, dict):
        body["checksum"] = store_module._json_hash(body)
    manifest.write_text(json.dumps(body))
    snapshot, (fault,) = store.newest()
    assert snapshot is None
    assert "is damaged" in fault


def test_a_manifest_that_is_nested_too_deeply_is_passed_over(tmp_path):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    (tmp_path / "snapshot-000001/manifest.json").write_text("[" * 100_000)
    assert store.newest()[0] is None
