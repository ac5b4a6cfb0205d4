"""A fault of one job ends that job; the others end with the weights that they would have had."""

import pytest
import torch

from loraloom.errors import ConfigError, TrainingError
from loraloom.formats.files import read_adapter
from loraloom.host.host import Host
from loraloom.training import run_directory
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.engine import Engine
from loraloom.training.step import fused
from tests.training.running import resumed
from tests.training.step.test_fused import assert_same
from tests.training.toy import ADAPTERS, read_result, toy_config, toy_engine, toy_set, weights_of

NO_SPACE = OSError(28, "No space left on device")


def measured(name: str, method: str = "lora", **settings):
    data = {"task": "skills", "validation_fraction": 0.5}
    return toy_config(name, ADAPTERS[method], data=data, eval_steps=2, max_steps=6, **settings)


@pytest.fixture
def engine(tmp_path) -> Engine:
    """Two jobs, of which the first will be hit."""
    return pair(tmp_path / "run")


CONFIGS = [measured("hit", "mixlora"), measured("well", "dora", seed=1)]
SETS = {name: toy_set(seed=seed, num_validation=3) for seed, name in enumerate(("hit", "well"))}


def pair(directory) -> Engine:
    return toy_engine(directory, CONFIGS, SETS, dtype=torch.float32)


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """Weights of the second job where nothing happens to the first."""
    engine = pair(tmp_path_factory.mktemp("unhurt"))
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
    assert_same(weights_of(well), unhurt, 1e-5)
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
    base, hit = engine.host.base, engine.jobs["hit"]
    run_and_check_neighbour(engine, unhurt, "job hit, after step 4: ZeroDivisionError: no answer")
    result = read_result(tmp_path / "run/hit")
    assert (result.steps, result.weights, result.best["step"]) == (4, "best", 2)
    _, tensors = read_adapter(tmp_path / "run/hit", base)
    assert all(torch.equal(tensors[name], best) for name, best in hit.best.items())


def test_a_forward_that_raises_stops_the_job_whose_rows_make_it_raise(
    engine, unhurt, tmp_path, monkeypatch
):
    hit = engine.jobs["hit"]

    def raises(host, parts, pad_id):
        return hit.position.step == 3 and any(part.adapter is hit.adapter for part in parts)

    fault = IndexError("index out of range in self")
    monkeypatch.setattr(fused, "add_gradients", failing(fused.add_gradients, raises, fault))
    run_and_check_neighbour(engine, unhurt, "IndexError: index out of range in self")
    assert read_result(tmp_path / "run/hit").steps == 2  # the last one that a forward has proven


def test_a_fault_that_the_base_model_has_too_ends_the_run(engine, tmp_path, monkeypatch):
    def lose(engine):
        if engine.round == 3:
            monkeypatch.setattr(Host, "hidden", failing(None, lambda *_: True, fault))

    fault = RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.run(lose)
    snapshot, _ = CheckpointStore(tmp_path / "run/.checkpoints").newest()
    assert {record.result for record in snapshot.jobs.values()} == {None}


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_stays(
    engine, unhurt, tmp_path, monkeypatch
):
    full = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing(torch.save, lambda *_: engine.round == 4, full))
        with pytest.raises(TrainingError, match=r"cannot be written to .*the previous checkpoint"):
            engine.run()
    again = resumed(tmp_path / "run", CONFIGS, SETS, dtype=torch.float32)
    assert again.round == 2
    is_hit = lambda directory, *_: directory.name == "hit"  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(
            run_directory, "write_adapter", failing(run_directory.write_adapter, is_hit, NO_SPACE)
        )
        with pytest.raises(ConfigError, match=r"output_dir must be writable.*No space left"):
            again.run()
    again = resumed(tmp_path / "run", CONFIGS, SETS, dtype=torch.float32)
    well = again.jobs["well"]
    assert [result.status for result in again.run()] == ["finished", "finished"]
    for name, weight in weights_of(well).items():
        assert torch.equal(weight, unhurt[name])
