"""LoRA and DoRA are PEFT's, with the same weights: logits and gradients."""

import copy

import pytest
import torch
from torch import Tensor

import loraloom
from loraloom.adapters import LoraConfig
from tests.parity.peft_models import copy_to_peft, their_parameter, wrapped_by_peft
from tests.tiny import gradients, padded_mask, randomise, relative_error, tiny_ids, tiny_model

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
    return (real * torch.linspace(-1, 1, real.numel(), dtype=real.dtype).view_as(real)).tanh().sum()


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
    copy_to_peft(theirs, host.base, adapter)
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
        assert relative_error(grad, their_parameter(theirs, host.base, name).grad) < tolerance, name
