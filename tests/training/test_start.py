from __future__ import annotations

import pytest
import torch

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.errors import ConfigError, FormatError
from loraloom.training.builder import load_start
from tests.tiny import METHODS, changed, randomise
from tests.training.toy import toy_host

TOP_P = MixLoraConfig(rank=2, num_experts=4, routing="top_p")


@pytest.fixture(params=METHODS)
def stored(request, tmp_path):
    """A method, and a directory with an adapter of it."""
    host = toy_host()
    randomise(host.add("old", METHODS[request.param], seed=3), seed=3)
    host.save("old", tmp_path / "old")
    return request.param, str(tmp_path / "old")


def test_a_new_adapter_gets_the_weights_of_the_old_one(stored):
    method, path = stored
    host = toy_host()
    old, new = host.load("old", path), host.add("new", changed(METHODS[method], dropout=0.3))
    load_start(host, new, path)
    own = new.tensors()
    assert all(torch.equal(own[name], tensor) for name, tensor in old.tensors().items())


def test_weights_that_would_be_used_otherwise_are_refused(stored):
    method, path = stored
    host = toy_host()
    new = host.add("new", changed(METHODS[method], alpha=60))
    with pytest.raises(
        ConfigError, match=r"start_from needs an adapter with the job's own .*scaling"
    ):
        load_start(host, new, path)


def test_weights_of_another_rank_are_refused(tmp_path):
    host = toy_host()
    host.add("old", METHODS["lora"])
    host.save("old", tmp_path / "old")
    config = METHODS["lora"]
    new = host.add("new", changed(config, rank=6, alpha=2 * config.alpha))
    with pytest.raises(ConfigError, match=f"rank is 6 and that adapter's {config.rank}"):
        load_start(host, new, str(tmp_path / "old"))


@pytest.mark.parametrize(
    ("old", "new", "setting"),
    [
        (LoraConfig(rank=2, init="pissa"), LoraConfig(rank=2), "init"),
        (LoraConfig(rank=2), LoraConfig(rank=2, init="olora"), "init"),
        (LoraConfig(rank=2, alpha_pattern={"q_proj": 7.0}), LoraConfig(rank=2), "alphas"),
        (TOP_P, changed(TOP_P, temperature=2.0), "temperature"),
        (TOP_P, changed(TOP_P, compat="moe-peft"), "compat"),
    ],
)
def test_settings_that_leave_no_trace_in_shapes_must_agree_too(tmp_path, old, new, setting):
    host = toy_host()
    host.add("old", old)
    host.save("old", tmp_path / "old")
    with pytest.raises(ConfigError, match=f"{setting} is "):
        load_start(host, host.add("new", new), str(tmp_path / "old"))


def test_an_adapter_that_is_not_there_is_an_error(tmp_path):
    host = toy_host()
    with pytest.raises(FormatError, match="gone"):
        load_start(host, host.add("new", METHODS["lora"]), str(tmp_path / "gone"))
