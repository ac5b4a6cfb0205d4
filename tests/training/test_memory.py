from __future__ import annotations

import pytest
import torch

from loraloom.errors import ConfigError
from loraloom.training.rounds import adapter_bytes, base_bytes
from loraloom.training.run import train
from loraloom.training.settings import load_run_config
from tests.training.running import trained_weights
from tests.training.saved import run_settings, save_inputs, write_run_file
from tests.training.toy import add_job, toy_config, toy_engine


def test_a_limit_without_room_for_what_is_loaded_is_refused_before_anything_is_written(tmp_path):
    settings = run_settings(save_inputs(tmp_path), tmp_path / "out")
    path = write_run_file(tmp_path / "run.yaml", {**settings, "memory_limit": "10kB"})
    with pytest.raises(
        ConfigError, match=r"must fit into 0.00 GB \(memory_limit\), base model, adapters and"
    ):
        train(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["lots", "20 elephants", -5])
def test_a_limit_that_is_no_size_is_refused(tmp_path, given):
    settings = run_settings(tmp_path, tmp_path / "out")
    path = write_run_file(tmp_path / "run.yaml", {**settings, "memory_limit": given})
    with pytest.raises(ConfigError, match="memory_limit could not"):
        load_run_config(path)


def test_a_job_that_joins_must_fit_as_well(tmp_path):
    alone = toy_engine(tmp_path / "alone", [toy_config("a")])
    limit = base_bytes(alone.host) + 6 * adapter_bytes(alone.host)
    engine = toy_engine(tmp_path / "out", [toy_config("a")], memory_limit=limit)
    engine.step()
    with pytest.raises(ConfigError, match=r"a step must fit into .* \(memory_limit\)"):
        engine.add(add_job(engine.host, toy_config("b")))
    assert list(engine.host.adapters) == ["a"]
    assert not (tmp_path / "out/b").exists()
    alone.step()
    expected = trained_weights(alone)["a"]
    assert all(
        torch.equal(weights, expected[name])
        for name, weights in trained_weights(engine)["a"].items()
    )
