"""LoRA and DoRA are PEFT's, with the same weights: logits and gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor

import loraloom
from loraloom.adapters import LoraConfig
from tests.parity.peft_models import their_parameter, wrapped_by_peft
from tests.tiny import (
    changed,
    gradients,
    padded_mask,
    randomise,
    relative_error,
    tiny_ids,
    tiny_model,
)

# peft 0.21 asks transformers 5.24 in a way that the latter calls deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = tiny_ids(3)
MASK = padded_mask([7, 4, 6])
FAMILIES = ("llama", "phi", "phi3", "gpt_neox")
CONFIGS = {
    "lora": LoraConfig(rank=3, alpha=6),
    "rslora": LoraConfig(rank=3, alpha=6, rank_stabilized=True),
    "dora": LoraConfig(rank=3, alpha=6, weight_decomposition=True),
    "attention": LoraConfig(rank=3, alpha=6, target_modules="attention"),
}


def loss_of(logits: Tensor) -> Tensor:
    """Anything that depends on every real logit."""
    real = logits[MASK.bool()]
    weights = torch.linspace(-1, 1, real.numel(), dtype=real.dtype).view_as(real)
    return (real * weights).tanh().sum()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 5e-5), (torch.float64, 1e-10)],  # processors round float32 in their own ways
    ids=["32", "64"],
)
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(family, method, dtype, tolerance):
    model, config = tiny_model(family, dtype), CONFIGS[method]
    host = loraloom.attach(copy.deepcopy(model))
    adapter = randomise(host.add("a", config))
    theirs = wrapped_by_peft(model, config, host.base)
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            their_parameter(theirs, host.base, name).copy_(tensor)
    trainable = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trainable == sum(p.numel() for p in adapter.parameters())
    theirs.train()  # in eval mode PEFT keeps DoRA's norm from before the weights were copied
    expected = theirs(input_ids=IDS, attention_mask=MASK).logits
    actual = host(IDS, MASK, ["a"] * 3).logits
    real = MASK.bool()
    assert relative_error(actual[real].detach(), expected[real].detach()) < tolerance
    loss_of(expected).backward()
    loss_of(actual).backward()
    for name, grad in gradients(adapter).items():
        wanted = their_parameter(theirs, host.base, name).grad
        assert relative_error(grad, wanted) < tolerance, name


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_is_off_in_eval_as_in_peft(method):
    model, config = tiny_model(), changed(CONFIGS[method], dropout=0.5)
    host = loraloom.attach(copy.deepcopy(model))
    adapter = randomise(host.add("a", config))
    theirs = wrapped_by_peft(model, config, host.base).eval()
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            their_parameter(theirs, host.base, name).copy_(tensor)
        expected = theirs(input_ids=IDS, attention_mask=MASK).logits
        actual = host(IDS, MASK, ["a"] * 3).logits
    assert relative_error(actual[MASK.bool()], expected[MASK.bool()]) < 1e-10


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_a_new_adapter_starts_from_the_distribution_that_peft_uses(init):
    model = tiny_model(hidden_size=128, intermediate_size=256)
    host = loraloom.attach(copy.deepcopy(model))
    ours = host.add("a", LoraConfig(rank=16, alpha=16, init=init)).tensors()
    theirs = peft.LoraConfig(
        r=16,
        target_modules=list(host.base.attention_projections),
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    wrapped = peft.get_peft_model(model, theirs)
    name = "layers.0.self_attn.q_proj.lora_A"
    mine, other = ours[name], their_parameter(wrapped, host.base, name).detach()
    assert float(mine.std()) == pytest.approx(float(other.std()), rel=0.1)
    assert float(mine.abs().max()) == pytest.approx(float(other.abs().max()), rel=0.4)
    assert not any(tensor.any() for key, tensor in ours.items() if key.endswith("lora_B"))
