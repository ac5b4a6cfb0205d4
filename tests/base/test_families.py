"""Every family of base models with every method: the table that `families.py` promises."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaModel

import loraloom
from loraloom.base.families import FAMILIES
from loraloom.errors import ModelError
from tests.tiny import (
    ALL_FAMILIES,
    METHODS,
    tiny_ids,
    tiny_model,
)

SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_without_adapters_logits_are_the_base_models_bit_by_bit(family):
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(tiny_ids(3)).logits
        host = loraloom.attach(model)
        host.add("a", METHODS["mixdora"])
        assert torch.equal(host(tiny_ids(3)).logits, expected)
        assert torch.equal(host(tiny_ids(3), adapters=[None] * 3).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_fingerprint_is_one_for_all_dtypes_that_a_checkpoint_is_read_in(dtype):
    model = tiny_model("llama", torch.bfloat16)  # as it is stored
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # subnormal in float16
    stored = loraloom.attach(model)
    expected = stored.base.fingerprint
    assert loraloom.attach(stored.detach().to(dtype)).base.fingerprint == expected


CHANGES = {
    "llama": (
        "model.embed_tokens",
        "model.layers.1.self_attn.k_proj",
        "model.layers.3.mlp.up_proj",
        "model.layers.2.input_layernorm",
        "model.norm",
        "lm_head",
    ),
    "qwen3_moe": ("model.layers.1.mlp.gate", "model.layers.2.mlp.experts", "model.norm"),
    "gemma3": ("model.language_model.layers.1.mlp.up_proj", "lm_head"),
}


@pytest.mark.parametrize(
    ("family", "path"), [(family, path) for family, paths in CHANGES.items() for path in paths]
)
def test_the_fingerprint_tells_bases_apart_of_which_one_row_was_edited(family, path):
    prints = set()
    for factor in (1.0, 1.3):
        model = tiny_model(family, torch.float32, num_hidden_layers=5)
        module = model.get_submodule(path)
        with torch.no_grad():
            for weight in module.parameters():
                weight.view(-1, weight.shape[-1])[-1].mul_(factor)
        prints.add(loraloom.attach(model).base.fingerprint)
    assert len(prints) == 2


def test_a_tied_head_and_an_equal_one_have_one_fingerprint():
    prints = set()
    for is_tied in (True, False):
        model = tiny_model("llama", torch.float32, tie_word_embeddings=True)
        if not is_tied:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        base = loraloom.attach(model).base
        assert base.ties_head == is_tied
        prints.add(base.fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("model", "linears"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)), "lm_head"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "0"),
        (
            lambda: LlamaModel(LlamaConfig(num_hidden_layers=1, **SMALL)),
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
    ],
    ids=["gpt2", "no transformer", "no causal LM"],
)
def test_an_unsupported_model_is_told_the_families_and_its_linear_modules(model, linears):
    with pytest.raises(ModelError) as caught:
        loraloom.attach(model())
    message = str(caught.value)
    assert all(family in message for family in FAMILIES)
    assert message.endswith(f"its linear modules are {linears}")
