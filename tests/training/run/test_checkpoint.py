from __future__ import annotations

import json

import pytest
import torch

from loraloom.errors import TrainingError
from loraloom.training.run.checkpoint import JobRecord, SnapshotStore

BASE = {"name": "tiny", "dtype": "float32"}


def write(store: SnapshotStore, round_number: int, **options) -> None:
    records = {"a": JobRecord({"seed": 0}, 12), "b": JobRecord({}, result={})}
    states = {"a": {"weights": torch.full((3,), float(round_number)), "step": round_number}}
    store.write(round_number, 1.5, BASE, records, states, **options)


def newest_directory(store: SnapshotStore):
    return sorted(store.directory.iterdir())[-1]


def test_a_snapshot_comes_back_as_it_was(tmp_path):
    store = SnapshotStore(tmp_path / "snapshots")
    write(store, 7)
    snapshot, faults = store.newest()
    assert faults == []
    assert (snapshot.round, snapshot.seconds, snapshot.base) == (7, 1.5, BASE)
    assert (snapshot.done, snapshot.jobs["a"].metrics_bytes) == ({"b"}, 12)
    assert snapshot.load_state("a")["step"] == 7
    assert snapshot.load_state("b") is None


def test_the_newest_two_are_kept(tmp_path):
    store = SnapshotStore(tmp_path)
    for round_number in (1, 5, 5, 9):
        write(store, round_number)
    assert len(list(tmp_path.iterdir())) == 2
    assert store.newest()[0].round == 9


def test_none_is_newest_where_there_is_none(tmp_path):
    store = SnapshotStore(tmp_path / "snapshots")
    assert store.newest() == (None, [])
    assert not store.exists()


@pytest.mark.parametrize("damage", ["torn", "edited", "gone", "manifest", "no manifest"])
def test_a_damaged_snapshot_is_passed_over_and_named(tmp_path, damage):
    store = SnapshotStore(tmp_path)
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
    store = SnapshotStore(tmp_path)
    write(store, 1)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        write(store, 2)
    snapshot, faults = store.newest()
    assert (snapshot.round, faults) == (1, [])


def test_files_are_synced_before_they_appear(tmp_path, quick_disk):
    write(SnapshotStore(tmp_path), 1)
    assert len(quick_disk) >= 4  # state, manifest, their directory, the one above


def test_a_full_disk_is_a_training_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"can't be written to .* No space left"):
        write(SnapshotStore(tmp_path), 1)
