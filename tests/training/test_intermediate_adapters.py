"""Intermediate adapters: files of a job while it trains, for users to load, serve and copy."""

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loraloom.errors import ConfigError
from loraloom.formats.files import read_adapter
from loraloom.serve.adapter_files import names_below
from loraloom.training import run_directory
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.run_directory import RunDirectory
from tests.tiny import tiny_model
from tests.training.running import intermediate_files, resumed
from tests.training.toy import add_job, toy_config, toy_engine, toy_set

HELD_OUT = {"task": "skills", "validation_fraction": 0.5}


def steps_in(directory: Path) -> list[int]:
    """List the steps of a job's intermediate adapters."""
    return sorted(
        int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*")
    )


def measured(losses: list[float], **train):
    """Make a job that is measured after each step, with these losses."""
    settings = {"max_steps": len(losses), "eval_steps": 1, "data": HELD_OUT, **train}
    return toy_config("a", **settings), iter(losses)


def run_measured(directory: Path, losses: list[float], **train) -> Path:
    config, values = measured(losses, **train)
    engine = toy_engine(directory, [config], {"a": toy_set(num_validation=2)})
    engine.builder.measure = lambda jobs: {"a": {"eval/loss": next(values)}}
    engine.run()
    return directory / "a"


def test_an_adapter_is_written_every_save_steps_and_peft_loads_it(tmp_path):
    config = toy_config("a", max_steps=5, save_steps=2)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    job, base = engine.jobs["a"], engine.host.base
    weights = {}

    def copy(engine):
        weights[job.position.step] = {n: t.clone() for n, t in job.adapter.tensors().items()}

    engine.run(copy)
    assert steps_in(tmp_path / "a") == [2, 4]
    assert names_below(tmp_path / "a") == [
        "checkpoint-2",
        "checkpoint-4",
    ]  # as a server offers them
    for step in (2, 4):
        directory = tmp_path / f"a/checkpoint-{step}"
        _, tensors = read_adapter(directory, base)
        assert all(torch.equal(tensors[name], weights[step][name]) for name in tensors)
        card = (directory / "README.md").read_text()
        assert f"The weights after {step} of 5 steps" in card
        PeftModel.from_pretrained(tiny_model("llama", torch.float32), directory)


@pytest.mark.parametrize(
    ("losses", "settings", "expected"),
    [
        ([3.0, 2.0, 1.0, 4.0, 5.0, 6.0], {"save_steps": 1}, [1, 2, 3, 4, 5, 6]),
        ([3.0, 2.0, 1.0, 4.0, 5.0, 6.0], {"save_steps": 1, "save_total_limit": 3}, [3, 5, 6]),
        ([3.0, 2.0, 1.0, 4.0, 5.0, 6.0], {"save_steps": 1, "save_total_limit": 1}, [3, 6]),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], {"save_steps": 1, "save_total_limit": 1}, [6]),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], {"save_steps": 4}, [4]),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], {}, []),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, losses, settings, expected):
    assert steps_in(run_measured(tmp_path, losses, **settings)) == expected


def test_while_a_job_trains_its_best_evaluation_can_be_loaded(tmp_path):
    config, values = measured([3.0, 1.0, 2.0, 4.0])
    engine = toy_engine(tmp_path, [config], {"a": toy_set(num_validation=2)})
    engine.builder.measure = lambda jobs: {"a": {"eval/loss": next(values)}}
    seen = []
    save_state = engine.save_state

    def saving():
        save_state()
        seen.append(steps_in(tmp_path / "a"))

    engine.save_state = saving
    engine.run()
    assert seen == [[1], [2], [2], []]


def test_a_kill_before_the_checkpoint_loses_no_intermediate_adapter(tmp_path, monkeypatch):
    configs = [toy_config("a", save_steps=1, save_total_limit=1)]
    toy_engine(tmp_path / "unbroken", configs).run()
    write = CheckpointStore.write

    def dying(store, moment, *args, **options):
        if moment.round == 3:
            raise KeyboardInterrupt
        write(store, moment, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            toy_engine(tmp_path / "killed", configs).run()
    assert steps_in(tmp_path / "killed/a") == [2, 3]
    again = resumed(tmp_path / "killed", configs)
    assert steps_in(tmp_path / "killed/a") == [2]
    again.run()
    assert intermediate_files(tmp_path / "killed") == intermediate_files(tmp_path / "unbroken")


def test_a_reader_meets_whole_directories_alone(tmp_path, monkeypatch):
    met = []
    replace = os.replace

    def watching(*args):
        met.extend(sorted(path.iterdir()) for path in (tmp_path / "a").glob("checkpoint-*"))
        replace(*args)

    monkeypatch.setattr(os, "replace", watching)
    toy_engine(tmp_path, [toy_config("a", save_steps=1, save_total_limit=1)]).run()
    assert met
    assert {len(files) for files in met} == {3}


def test_weights_that_are_not_finite_are_no_intermediate_adapter(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("a", save_steps=1, learning_rate=1e308)])
    (result,) = engine.run()
    assert result.status == "failed"
    assert steps_in(tmp_path / "a") == []


def test_an_intermediate_adapter_is_not_replaced_unasked(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("a")])
    (tmp_path / "b/checkpoint-2").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"job b must be new in .* there is .*checkpoint-2"):
        engine.add(add_job(engine.host, toy_config("b")))
    (tmp_path / "b/checkpoint-2-mine").mkdir()
    RunDirectory(tmp_path).prepare(["b"])
    assert os.listdir(tmp_path / "b") == ["checkpoint-2-mine"]


def test_an_old_one_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch):
    def busy(path):
        raise OSError("busy")

    monkeypatch.setattr(run_directory, "remove_directory", busy)
    (result,) = toy_engine(tmp_path, [toy_config("a", save_steps=1, save_total_limit=1)]).run()
    assert result.status == "finished"
    assert steps_in(tmp_path / "a") == [1, 2, 3, 4]
