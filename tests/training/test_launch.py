from __future__ import annotations

import pytest

from loraloom.errors import ConfigError
from loraloom.training.inbox import WatchOptions
from loraloom.training.parallel import Launch, rank_device, read_launch
from loraloom.training.run import train
from loraloom.training.settings import RunConfig
from tests.training.toy import toy_config, toy_host, toy_tokenizer

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
TWO = Launch(1, 2, 1, 2)


def test_what_torchrun_says_is_read():
    assert read_launch(TORCHRUN) == Launch(1, 4, 1, 2)
    del (other := dict(TORCHRUN))["LOCAL_WORLD_SIZE"]
    assert read_launch(other) == Launch(1, 4, 1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": None}, "whole numbers .* KeyError: 'WORLD_SIZE'; start with `torchrun"),
        ({"WORLD_SIZE": "two"}, "RANK, WORLD_SIZE, LOCAL_RANK must be whole numbers .* 'two'"),
    ],
)
def test_half_a_launcher_is_an_error(changes, message):
    merged = {**TORCHRUN, **changes}
    environment = {name: value for name, value in merged.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        read_launch(environment)


def test_ranks_have_a_device_each():
    assert rank_device("mps:3", Launch()) == "mps:3"  # a single process takes what it is told
    assert rank_device("cpu", TWO) == "cpu"


def test_an_accelerator_is_never_shared(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert rank_device("cuda", TWO) == "cuda:1"
    with pytest.raises(ConfigError, match=r"must be auto or one of .* got cuda:0"):
        rank_device("cuda:0", TWO)
    with pytest.raises(ConfigError, match="got 3 ranks and 2 devices on this machine"):
        rank_device("cuda", Launch(0, 3, 0, 3))


def test_a_method_whose_loss_joins_all_tokens_is_refused_among_several(tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    job = toy_config("a").model_dump() | {"adapter": {"method": "loramoe"}}
    settings = {"base_model": "none", "output_dir": tmp_path / "out", "jobs": [job]}
    with pytest.raises(ConfigError, match="job a: method loramoe needs a single process"):
        train(RunConfig.model_validate(settings))


def test_a_base_model_that_is_loaded_is_not_taken_apart(tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    job = toy_config("a").model_dump()
    settings = {"base_model": "none", "output_dir": tmp_path / "out", "jobs": [job]}
    run = RunConfig.model_validate({**settings, "parallel": {"base": "fsdp"}})
    with pytest.raises(ConfigError, match=r"takes a base model apart as it is loaded, .*got one"):
        train(run, base=(toy_host(), toy_tokenizer()))


def test_a_sweep_and_a_watched_directory_need_one_process(tmp_path, monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    settings = {"base_model": "none", "output_dir": tmp_path / "out"}
    with pytest.raises(ConfigError, match=r"--watch needs one process, got 4 ranks; start it with"):
        train(settings, watch=WatchOptions(tmp_path))
