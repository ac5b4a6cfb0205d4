"""Where only some of a model's modules are adapted: text parts, and layers of two kinds."""

import copy

import peft
import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig, RoutedConfig, VeraConfig
from loraloom.errors import AdapterError
from tests.conftest import build_tokenizer
from tests.tiny import (
    ALL_METHODS,
    METHODS,
    randomise,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

IDS = tiny_ids(2)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_a_model_of_images_and_text_is_loaded_exported_and_told_by_its_text_part(family, tmp_path):
    tokenizer = build_tokenizer()
    model = tiny_model(family, torch.float32, vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, _ = loraloom.load_base_model(str(tmp_path / "base"), dtype="float32")
    host = loraloom.attach(loaded)
    assert host.config.vocab_size == len(tokenizer)
    assert host.base.layers_path == "model.language_model.layers"
    adapter = randomise(host.add("a", METHODS["lora"]))
    with torch.no_grad():
        assert torch.equal(host(IDS).logits, model(IDS).logits)
        done = loraloom.export(host, tokenizer, "a", tmp_path / "out")
        merged, _ = loraloom.load_base_model(str(done.path), dtype="float32")
        assert relative_error(merged(IDS).logits, host(IDS, adapters=["a", "a"]).logits) < 1e-4
    assert not [name for name in adapter.tensors() if "vision" in name]


CHOSEN = {
    "dora": METHODS["dora"],
    "vera": VeraConfig(rank=3),
    "a layer": LoraConfig(rank=3, layers=(1,)),
    "places": LoraConfig(
        rank=3,
        target_modules=("layers.1.self_attn.q_proj",),
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
    ),
}


@pytest.mark.parametrize("config", CHOSEN.values(), ids=CHOSEN.keys())
@pytest.mark.parametrize("family", ["gemma3", "lfm2"])
def test_peft_adapts_what_the_adapter_does_and_nothing_else(family, config, tmp_path):
    model = tiny_model(family)
    host = loraloom.attach(copy.deepcopy(model))
    randomise(host.add("a", config))
    host.save("a", tmp_path / "a")
    host.load("b", tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    with torch.no_grad():
        ours = host(IDS, adapters=["a", "b"]).logits
        expected = theirs(input_ids=IDS).logits
    assert relative_error(ours, expected) < 1e-6
    adapted = {name for name, _ in theirs.named_parameters() if "lora_" in name or "vera_l" in name}
    assert not [name for name in adapted if "vision" in name or ".conv." in name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (METHODS["mixlora"], r"MixLoRA requires experts: .*\(gate_up_proj, down_proj, moe\)"),
        (ALL_METHODS["loramoe"], "LoRAMoE requires experts"),
        (LoraConfig(target_modules="ffn"), "target_modules must name projections .* got ffn"),
        (
            LoraConfig(target_modules=("gate_proj",)),
            r"\(self_attn\.q_proj, .*, mlp\.experts\.down_proj\),.* or be .*experts, moe",
        ),
    ],
)
def test_the_experts_of_a_base_model_are_named_by_who_adapts_them(config, message):
    host = tiny_host("mixtral", {}, torch.float32)
    with pytest.raises(AdapterError, match=message):
        host.add("a", config)


@pytest.mark.parametrize("method", ["lora", "vera", "mola"])
def test_all_linear_layers_of_a_mixture_are_those_of_attention(method):
    host = tiny_host("mixtral", {}, torch.float32)
    adapter = host.add("a", ALL_METHODS[method])
    assert {projection.name for projection in adapter.projections()} == set(ATTENTION)
    host.add("c", RoutedConfig(experts={"a": "a"}))
