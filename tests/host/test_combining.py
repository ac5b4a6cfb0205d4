"""Combined LoRAs are PEFT's and the sum of their updates."""

import copy
from pathlib import Path

import peft
import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError, ConfigError
from loraloom.host.host import Host
from tests.parity.peft_models import copy_to_peft, wrapped_by_peft
from tests.tiny import (
    ALL_METHODS,
    randomise,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

IDS = tiny_ids(2, 6)
WEIGHTS = [0.7, -0.4]
FIRST, SECOND = LoraConfig(rank=3, alpha=6), LoraConfig(rank=3, alpha=3)


def in_both() -> tuple[Host, peft.PeftModel]:
    """The adapters `x` and `y` on a host and on a model of PEFT's."""
    model = tiny_model(dtype=torch.float32)
    host = loraloom.attach(copy.deepcopy(model))
    theirs = wrapped_by_peft(model, FIRST, host.base)
    for seed, (name, config) in enumerate({"x": FIRST, "y": SECOND}.items()):
        randomise(host.add(name, config), seed)
        own = copy.deepcopy(theirs.peft_config["default"])
        own.r, own.lora_alpha = config.rank, int(config.alpha)
        theirs.add_adapter(name, own)
        copy_to_peft(theirs, host.base, host.adapters[name], name)
    return host, theirs


@torch.no_grad()
def test_a_combination_of_loras_is_pefts():
    host, theirs = in_both()
    theirs.add_weighted_adapter(["x", "y"], WEIGHTS, "z", combination_type="cat")
    theirs.set_adapter("z")
    theirs.eval()
    expected = theirs(input_ids=IDS).logits
    host.combine(["x", "y"], WEIGHTS, name="z")
    assert relative_error(host(IDS, adapters=["z", "z"]).logits, expected) < 1e-5


@torch.no_grad()
def test_a_sum_is_what_pefts_active_adapters_compute():
    host, theirs = in_both()
    theirs.base_model.set_adapter(["x", "y"])
    weighted = tuple(zip("xy", WEIGHTS, strict=True))
    for layer in filter(lambda module: hasattr(module, "set_scale"), theirs.modules()):
        for name, weight in weighted:
            layer.set_scale(name, weight)
    expected = theirs.eval()(input_ids=IDS).logits
    assert relative_error(host(IDS, adapters=["x:0.7+y:-0.4", weighted]).logits, expected) < 1e-6


def assert_is_sum(host: Host, name: str, directory: Path) -> None:
    """Whether an adapter is the weighted sum of `x` and `y`, also when it is loaded."""
    host.save(name, directory)
    host.load("again", directory)
    total, combined, again = (
        host(IDS, adapters=[row] * 2).logits for row in ("x:0.7+y:-0.4", name, "again")
    )
    assert relative_error(combined, total) < 1e-12
    assert relative_error(again, total) < 1e-6  # files are in float32


@torch.no_grad()
@pytest.mark.parametrize(
    ("other", "targets"),
    [
        ({"target_modules": ("q_proj", "k_proj")}, ("q_proj", "k_proj", "v_proj")),
        ({"target_modules": "ffn"}, ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")),
        ({"target_modules": ("v_proj", "o_proj"), "layers": (1,)}, None),
        ({"target_modules": ("layers.0.mlp.up_proj",), "rank_pattern": {"up_proj": 2}}, None),
    ],
)
def test_loras_behind_one_another_are_on_all_projections_of_any(tmp_path, other, targets):
    first = LoraConfig(rank=3, alpha=6, target_modules=["q_proj", "v_proj"])
    host = tiny_host(configs={"x": first, "y": LoraConfig(rank=4, alpha=2, **other)})
    combined = host.combine(["x", "y"], WEIGHTS, name="z")
    assert targets in (None, combined.config.target_modules)
    assert_is_sum(host, "z", tmp_path)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["lora", "mixlora"], AdapterError, "must be LoRAs, got MixLoRA"),
        (["lora", "dora"], AdapterError, "must be LoRAs, got DoRA"),
        (["lora", "own"], AdapterError, "must be without modules_to_save"),
        (["lora"], ConfigError, "a finite number for each of the adapters"),
    ],
)
def test_what_cannot_be_combined_is_refused(names, error, message):
    own = LoraConfig(rank=3, modules_to_save=["lm_head"])
    host = tiny_host(configs=ALL_METHODS | {"own": own}, dtype=torch.float32)
    with pytest.raises(error, match=message):
        host.combine(names, [1.0, 1.0], name="c")
    assert "c" not in host.adapters
