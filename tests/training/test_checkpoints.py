import json
import math
import shutil
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock, Timeout

from loraloom.atomic_io import remove
from loraloom.errors import ConfigError
from loraloom.training import checkpoints, run_directory
from loraloom.training.checkpoints import (
    Checkpoint,
    CheckpointStore,
    JobRecord,
    check_same_run,
    describe_base,
)
from loraloom.training.job import JobResult
from loraloom.training.run_directory import RunDirectory
from tests.training.toy import toy_host

KIND = {"job": "b", "status": "finished", "error": None, "method": "LoRA", "base_model": "tiny"}
COUNTS = {"num_parameters": 1, "steps": 2, "epochs": 1.0, "tokens": 3, "computed_tokens": 4}
MEASURED = {"weights": "last", "metrics": {}, "best": None, "last_metrics": {}, "seconds": 1.5}
REST = {"padding_share": 0.25, "data": ("toy: 3 rows",), "peak_memory_bytes": {}, "environment": {}}
RESULT = JobResult(**KIND, **COUNTS, **MEASURED, **REST)
BASE = {"name": "tiny", "dtype": "float32"}


def write(store: CheckpointStore, round_number: int, **options) -> None:
    records = {"a": JobRecord({"seed": 0}, 12), "b": JobRecord({}, result=RESULT)}
    states = {"a": {"weights": torch.full((3,), float(round_number)), "step": round_number}}
    store.write(Checkpoint(round_number, 1.5, BASE, records), states, **options)


def test_a_snapshot_comes_back_as_it_was(tmp_path):
    store = CheckpointStore(tmp_path / "snapshots")
    write(store, 7)
    snapshot, faults = store.newest()
    assert faults == []
    assert (snapshot.round, snapshot.seconds, snapshot.base) == (7, 1.5, BASE)
    assert snapshot.jobs["a"].metrics_bytes == 12
    assert snapshot.load_state("a")["step"] == 7
    assert snapshot.load_state("b") is None
    assert snapshot.jobs["b"].result == RESULT


def test_the_newest_two_are_kept(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    for round_number in (1, 5, 5, 9):
        write(store, round_number)
    assert len(list(tmp_path.iterdir())) == 2
    assert store.newest()[0].round == 9
    with monkeypatch.context() as patch:  # an old one can't be deleted, on NFS for example
        patch.setattr(checkpoints, "remove", Mock(side_effect=OSError("busy")))
        write(store, 10)
    assert len(list(tmp_path.iterdir())) == 3
    write(store, 11)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["torn", "edited", "gone", "manifest", "no manifest"])
def test_a_damaged_snapshot_is_passed_over_and_named(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    directory = sorted(store.directory.iterdir())[-1]
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


@pytest.mark.parametrize(
    "change",
    [
        ["jobs"],
        {"jobs": {"a": {"settings": 3}}},
        {"jobs": {"../a": {"settings": {}, "sha256": "0"}}},
        {"seconds": math.inf},
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
        body["checksum"] = checkpoints._json_hash(body)
    manifest.write_text(json.dumps(body))
    snapshot, (fault,) = store.newest()
    assert snapshot is None
    assert "is damaged" in fault


def test_resume_needs_checkpoints_where_there_are_results(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.check(resume=True, overwrite=False)
    (tmp_path / "a").mkdir()
    with pytest.raises(ConfigError, match="--resume requires checkpoints"):
        directory.check(resume=True, overwrite=False)
    directory.checkpoints.write(Checkpoint(0, 0.0, {}, {"a": JobRecord({})}), {})
    directory.check(resume=True, overwrite=False)


def test_overwriting_takes_this_runs_files_and_leaves_others(tmp_path):
    directory = RunDirectory(tmp_path)
    for job in ("a", "other"):
        (directory.job(job) / "checkpoints/last").mkdir(parents=True)
        for name in ("metrics.jsonl", "result.json", "notes.txt", "adapter_config.json"):
            (directory.job(job) / name).write_text("{}")
    directory.prepare(["a"])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]
    assert len(list((tmp_path / "other").iterdir())) == 5


def test_a_run_killed_while_it_overwrites_leaves_no_checkpoint_to_resume(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    write(directory.checkpoints, 1)

    def dies(path):
        1 / 0 if path.parent.name == "a" else remove(path)

    monkeypatch.setattr(run_directory, "remove", dies)
    with pytest.raises(ZeroDivisionError):
        directory.prepare(["a"])
    assert directory.checkpoints.newest() == (None, [])


@pytest.mark.parametrize("file", ["result.json", "adapter_config.json", "adapter_model.bin"])
def test_a_job_that_joins_replaces_no_adapter_unasked(tmp_path, file):
    directory = RunDirectory(tmp_path)
    (tmp_path / "a" / file).parent.mkdir(parents=True)
    (tmp_path / "a" / file).write_text("mine")
    with pytest.raises(ConfigError, match=rf"job a must be new in .*there is .*{file}"):
        directory.prepare_job("a")
    assert (tmp_path / "a" / file).read_text() == "mine"
    directory.prepare_job("a", overwrite=True)
    assert not (tmp_path / "a" / file).exists()


def test_the_lock_is_held_until_what_it_is_in_is_gone(tmp_path, monkeypatch):
    locked: list[bool] = []

    def watched(path):
        lock = FileLock(path / ".lock", timeout=0)
        with suppress(Timeout):
            lock.acquire()
        locked.append(not lock.is_locked)
        lock.release()
        remove(path)

    monkeypatch.setattr(run_directory, "remove", watched)
    with RunDirectory(tmp_path / "out").opened(resume=False, overwrite=False):
        pass
    assert locked == [True]
    with RunDirectory(tmp_path / "gone").opened(resume=False, overwrite=False):
        shutil.rmtree(tmp_path / "gone")
    assert not (tmp_path / "out").exists()


def test_what_a_killed_run_left_on_its_way_is_deleted(tmp_path):
    for place in ("out", "out/.checkpoints", "out/.checkpoints/worker-1-of-2"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / ".0123456789abcdef.writing").write_text("half")
    with RunDirectory(tmp_path / "out").opened(resume=False, overwrite=True):
        pass
    assert [*(tmp_path / "out").rglob("*.writing")] == []


def test_a_run_resumes_on_its_base_model_alone():
    host = toy_host()
    for recorded in (host.base.fingerprint, "0123456789abcdef"):  # as version 0.1.0 wrote it
        saved = describe_base(host) | {"fingerprint": recorded}
        check_same_run(Checkpoint(1, 1.5, saved, {}), [], describe_base(host, saved))
    saved = describe_base(host) | {"fingerprint": "v2-0123456789abcdef"}
    with pytest.raises(ConfigError, match=r"base\.fingerprint was 'v2-0123456789abcdef'"):
        check_same_run(Checkpoint(1, 1.5, saved, {}), [], describe_base(host, saved))
