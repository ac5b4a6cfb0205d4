"""A fault of one job ends that job; the others end with the weights that they would have had."""

from __future__ import annotations

import pytest
import torch

import loraloom.training.engine as engine_module
from loraloom.formats.files import read_adapter
from loraloom.models.host import Host
from loraloom.training import rounds, store
from loraloom.training.engine import Engine
from loraloom.training.store import CheckpointStore
from tests.tiny import relative_error
from tests.training.running import Spoken, resumed
from tests.training.toy import ADAPTERS, read_result, toy_config, toy_engine, toy_set, weights_of

NO_SPACE = OSError(28, "No space left on device")


def measured(name: str, method: str = "lora", **settings):
    data = {"task": "skills", "validation_fraction": 0.5}
    return toy_config(name, ADAPTERS[method], data=data, eval_steps=2, max_steps=6, **settings)


@pytest.fixture
def spoken() -> Spoken:
    return Spoken()


@pytest.fixture
def engine(tmp_path, spoken) -> Engine:
    """Two jobs, of which the first will be hit."""
    return pair(tmp_path / "run", spoken)


def pair(directory, spoken) -> Engine:
    configs = [measured("hit", "mixlora"), measured("well", "dora", seed=1)]
    sets = {name: toy_set(seed=seed, num_validation=3) for seed, name in enumerate(("hit", "well"))}
    return toy_engine(directory, configs, sets, dtype=torch.float32, progress=spoken)


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """Weights of the second job where nothing happens to the first."""
    engine = pair(tmp_path_factory.mktemp("unhurt"), Spoken())
    well = engine.jobs["well"]
    engine.run()
    return weights_of(well)


def run_and_check_neighbour(engine: Engine, unhurt, error: str) -> None:
    """Run to the end: the first job fails, and the second one does not notice."""
    well = engine.jobs["well"]
    results = {result.job: result for result in engine.run()}
    assert results["hit"].status == "failed"
    assert error in results["hit"].error
    assert results["well"].status == "finished"
    for name, weight in weights_of(well).items():
        assert relative_error(weight, unhurt[name]) < 1e-5, name
    assert engine.host.adapters == {}


def failing(function, when, error):
    """Make a function raise an error when its arguments say so."""

    def wrapped(*args, **options):
        if when(*args):
            raise error
        return function(*args, **options)

    return wrapped


def test_an_exception_in_an_evaluation_stops_that_job_only(engine, unhurt, tmp_path):
    measure = engine.builder.measure
    engine.builder.measure = failing(
        measure,
        lambda jobs: any(job.name == "hit" and job.position.step >= 4 for job in jobs),
        ZeroDivisionError("no answer"),
    )
    base = engine.host.base
    run_and_check_neighbour(engine, unhurt, "job hit, after step 4: ZeroDivisionError: no answer")
    result = read_result(tmp_path / "run/hit")
    assert (result.steps, result.weights, result.best["step"]) == (4, "best", 2)
    _, tensors = read_adapter(tmp_path / "run/hit", base)
    _, best = read_adapter(tmp_path / "run/hit/checkpoints/best", base)
    assert all(torch.equal(tensors[name], best[name]) for name in best)


def test_a_forward_that_raises_stops_the_job_whose_rows_make_it_raise(
    engine, unhurt, tmp_path, monkeypatch
):
    hit = engine.jobs["hit"]

    def raises(host, parts, pad_id):
        return hit.position.step == 3 and any(part.adapter is hit.adapter for part in parts)

    fault = IndexError("index out of range in self")
    monkeypatch.setattr(rounds, "forward_backward", failing(rounds.forward_backward, raises, fault))
    run_and_check_neighbour(engine, unhurt, "IndexError: index out of range in self")
    assert read_result(tmp_path / "run/hit").steps == 3


def test_a_fault_that_the_base_model_has_too_ends_the_run(engine, tmp_path, monkeypatch):
    def lose(engine):
        if engine.round == 3:
            monkeypatch.setattr(Host, "hidden", failing(None, lambda *_: True, fault))

    fault = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.run(lose)
    snapshot, _ = CheckpointStore(tmp_path / "run/.checkpoints").newest()
    assert {record.result for record in snapshot.jobs.values()} == {None}


def test_a_job_whose_files_can_not_be_written_has_failed_and_can_be_resumed(
    engine, unhurt, tmp_path, monkeypatch
):
    pair(tmp_path / "expected", Spoken()).run()
    is_hit = lambda directory, *_: directory.name == "hit"  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_adapter", failing(store.write_adapter, is_hit, NO_SPACE))
        run_and_check_neighbour(engine, unhurt, "job hit: its files can't be written: OSError")
    assert read_result(tmp_path / "run/hit").status == "failed"
    snapshot, _ = CheckpointStore(tmp_path / "run/.checkpoints").newest()
    assert snapshot.jobs["hit"].result is None
    configs = [measured("hit", "mixlora"), measured("well", "dora", seed=1)]
    again = resumed(tmp_path / "run", configs, {"hit": toy_set(num_validation=3)})
    results = {result.job: result.status for result in again.run()}
    assert again.round == 6
    assert results == {"hit": "finished", "well": "finished"}


def test_a_snapshot_that_can_not_be_written_is_tried_again_and_the_one_before_stays(
    engine, unhurt, tmp_path, monkeypatch, spoken
):
    monkeypatch.setattr(engine_module, "CHECKPOINT_RETRY_S", 0.0)
    store = tmp_path / "run/.checkpoints"
    well, seen = engine.jobs["well"], []

    def look(engine):
        snapshot, _ = CheckpointStore(store).newest()
        seen.append((engine.round, None if snapshot is None else snapshot.round))

    full = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    save = failing(torch.save, lambda *_: engine.round in (4, 5), full)
    monkeypatch.setattr(torch, "save", save)
    results = engine.run(look)
    assert [result.status for result in results] == ["finished", "finished"]
    assert dict(seen)[5] == dict(seen)[4] == 2
    assert CheckpointStore(store).newest()[0].round == 6
    assert sum("can't be written" in text for text in spoken.messages) == 2
    for name, weight in weights_of(well).items():
        assert torch.equal(weight, unhurt[name])
