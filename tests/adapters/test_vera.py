"""VeRA is PEFT's: projections, logits, gradients, and files in both directions."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import loraloom
from loraloom.adapters import VeraConfig
from loraloom.base.blocks import BaseInfo
from loraloom.formats.fields import write_fields
from loraloom.host.host import Host
from tests.adapters.plain import IDS, MASK, loss_of
from tests.tiny import changed, gradients, randomise, relative_error, tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"
)

CONFIG = VeraConfig(rank=5, d_initial=0.5, projection_seed=7)
TARGETS = {"all": "all-linear", "some": ("k_proj", "down_proj"), "attention": "attention"}
each_targets = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
each_way = pytest.mark.parametrize("saved", [True, False], ids=["saved", "drawn-again"])


def theirs_of(model: nn.Module, config: VeraConfig, base: BaseInfo) -> nn.Module:
    return peft.get_peft_model(model, peft.VeraConfig(**write_fields(config, base))).to(model.dtype)


def attached(model: nn.Module, config: VeraConfig) -> Host:
    host = loraloom.attach(copy.deepcopy(model))
    randomise(host.add("a", config))
    return host


def logits_of(host: Host) -> Tensor:
    with torch.no_grad():
        return host(IDS, MASK, ["a", "a"]).logits[MASK.bool()]


def their_logits(wrapped: nn.Module) -> Tensor:
    with torch.no_grad():
        return wrapped(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def their_parameter(wrapped: nn.Module, base: BaseInfo, name: str) -> nn.Parameter:
    path, _, part = name.removeprefix("layers.").rpartition(".")
    place = f"base_model.model.{base.layers_path}.{path}.vera_{part}"
    return wrapped.get_parameter(f"{place}.default")


@each_targets
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_logits_and_gradients_are_those_of_peft(family, targets):
    if family != "llama" and isinstance(targets, tuple):
        targets = "ffn"
    model, config = tiny_model(family), changed(CONFIG, target_modules=targets)
    host = attached(model, config)
    theirs = theirs_of(model, config, host.base)
    tensors = host.adapters["a"].tensors()
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    trained = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == len(own) == len(list(host.adapters["a"].parameters()))
    with torch.no_grad():
        for name, tensor in own.items():
            their_parameter(theirs, host.base, name).copy_(tensor)
    expected = theirs(input_ids=IDS, attention_mask=MASK).logits
    actual = host(IDS, MASK, ["a", "a"]).logits
    real = MASK.bool()
    assert relative_error(actual[real].detach(), expected[real].detach()) < 1e-10
    loss_of(actual).backward()
    loss_of(expected).backward()
    grads = gradients(host.adapters["a"])
    for name in own:
        wanted = their_parameter(theirs, host.base, name).grad
        assert wanted.any()
        assert relative_error(grads[name], wanted) < 1e-9, name


@each_way
@each_targets
def test_what_peft_saves_gives_its_logits_and_goes_back(tmp_path, targets, saved):
    model = tiny_model(dtype=torch.float32)
    config = changed(CONFIG, target_modules=targets, save_projection=saved)
    host = loraloom.attach(copy.deepcopy(model))
    theirs = theirs_of(copy.deepcopy(model), config, host.base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lambda_" in name:
                parameter.normal_(std=0.3, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = host.load("a", tmp_path / "theirs")
    assert loaded.config == changed(config, target_modules=loaded.config.target_modules)
    expected = their_logits(theirs)
    assert relative_error(logits_of(host), expected) < 1e-5
    host.save("a", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    assert relative_error(their_logits(again), expected) < 1e-5
