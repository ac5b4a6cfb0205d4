import pytest

from loraloom.errors import ConfigError
from loraloom.training.run import Launch, choose_device, read_launch
from loraloom.training.settings import RunConfig
from tests.training.toy import toy_config

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TWO = Launch(1, 2, 1, 2)


def run_on(device: str, **changes) -> RunConfig:
    settings = {"base_model": "none", "output_dir": "out", "device": device}
    return RunConfig.model_validate(settings | changes)


def test_what_torchrun_says_is_read():
    assert read_launch(TORCHRUN) == Launch(1, 4, 1, 2)
    del (other := dict(TORCHRUN))["LOCAL_WORLD_SIZE"]
    assert read_launch(other) == Launch(1, 4, 1, 4)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_what_torchrun_says_is_refused(name):
    with pytest.raises(ConfigError, match=f"must be set together, as torchrun .* got {name} alone"):
        read_launch({name: "1", "LOCAL_RANK": "0"})


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", ""])
@pytest.mark.parametrize("name", TORCHRUN)
def test_a_rank_that_is_no_number_is_refused(name, value):
    message = rf"RANK, WORLD_SIZE, .* must be whole numbers, .* got '{name}={value}'; start the run"
    with pytest.raises(ConfigError, match=message):
        read_launch(TORCHRUN | {name: value})


def test_ranks_have_an_accelerator_each(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert choose_device(run_on("mps"), Launch()) == "mps"  # a single process takes any
    assert choose_device(run_on("cpu"), TWO) == "cpu"
    assert choose_device(run_on("cuda"), TWO) == "cuda:1"
    with pytest.raises(ConfigError, match=r"must be auto or one of .* got cuda:0"):
        choose_device(run_on("cuda:0"), TWO)
    with pytest.raises(ConfigError, match="got 3 ranks and 2 devices on this machine"):
        choose_device(run_on("cuda"), Launch(0, 3, 0, 3))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"jobs": [toy_config("a").model_dump() | {"adapter": {"method": "loramoe"}}]},
            {},
            "job a: method loramoe requires a single process",
        ),
        (
            {"parallel": {"base": "fsdp"}},
            {"is_loaded": True},
            "requires a base model in floating .*got a loaded one",
        ),
        ({}, {"is_watching": True}, "--watch needs one process, got 2 ranks; start it without"),
    ],
    ids=["method", "base", "watch"],
)
def test_what_several_ranks_can_not_share_is_refused(changes, options, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(run_on("cpu", **changes), TWO, **options)
