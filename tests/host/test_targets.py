"""Targets on every registered mixture of experts: through our files, and through PEFT's."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import loraloom
from loraloom.adapters import AdapterConfig, LoraConfig, MixLoraConfig, VeraConfig
from loraloom.errors import AdapterError
from loraloom.host.host import Host
from tests.host.test_moe_bases import TYPES
from tests.tiny import ALL_METHODS, changed, randomise, relative_error, tiny_ids, tiny_model

IDS = tiny_ids(2)
MIXTURE = MixLoraConfig(rank=2, num_experts=3, top_k=2)
SEVEN = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@torch.no_grad()
def logits(host: Host, name: str) -> Tensor:
    return host(IDS, adapters=[name] * 2).logits


def kinds(host: Host) -> list[str]:
    return list(dict.fromkeys(block.kind for block in host.base.blocks))


def one_layers_experts(host: Host) -> tuple[str, ...]:
    """The experts of the last layer, and an attention layer's output."""
    (block,) = [block for block in host.base.blocks if block.kind == "experts"][-1:]
    stack = f"layers.{block.layers[-1]}.{block.path}.down_proj"
    attention = next(block for block in host.base.blocks if block.kind == "attention")
    return stack, f"{attention.path}.{attention.groups[-1][-1]}"


@pytest.mark.parametrize("family", TYPES)
def test_what_is_added_is_saved_and_loaded(family, tmp_path):
    host = loraloom.attach(tiny_model(family))
    configs: dict[str, AdapterConfig] = {
        "default": LoraConfig(rank=3),
        "all": LoraConfig(rank=3, target_modules=tuple(kinds(host))),
        "some": LoraConfig(rank=3, target_modules=one_layers_experts(host)),
        "layer": LoraConfig(rank=3, layers=(1,)),
        "mixture": changed(MIXTURE, target_modules=("attention", "experts")),
    }
    if "ffn" in kinds(host):
        configs["mixture-by-default"] = MIXTURE
    for name, config in configs.items():
        adapter = randomise(host.add(name, config))
        host.save(name, tmp_path / name)
        loaded = host.load("loaded", tmp_path / name)
        assert loaded.tensors().keys() == adapter.tensors().keys()
        assert torch.equal(logits(host, "loaded"), logits(host, name))
        host.remove("loaded")


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gemma4_text"])
def test_methods_come_back_with_shared_experts_and_two_kinds_of_ffn(family, method, tmp_path):
    host = loraloom.attach(tiny_model(family))
    randomise(host.add("a", ALL_METHODS[method]))
    host.save("a", tmp_path)
    host.load("b", tmp_path)
    assert torch.equal(logits(host, "a"), logits(host, "b"))


@pytest.mark.filterwarnings("ignore")  # that a rank_pattern is ignored, which then is applied
@pytest.mark.parametrize("family", TYPES)
def test_peft_adapts_what_was_adapted_here(family, tmp_path):
    host = loraloom.attach(tiny_model(family))
    configs = {
        "default": LoraConfig(rank=3),
        "experts": LoraConfig(rank=4, target_modules="experts"),
        "some": LoraConfig(rank=3, target_modules=one_layers_experts(host)),
        "vera": VeraConfig(rank=5),
    }
    for name, config in configs.items():
        randomise(host.add(name, config))
        host.save(name, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(tiny_model(family), str(tmp_path / name))
        with torch.no_grad():
            assert relative_error(logits(host, name), theirs(input_ids=IDS).logits) < 1e-6


def trained_by_peft(family: str, path: Path, **settings: Any) -> Tensor:
    """Save an adapter of PEFT's with random weights, and return its logits."""
    model = peft.get_peft_model(tiny_model(family), peft.LoraConfig(r=3, lora_alpha=6, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3, generator=generator)
        model.save_pretrained(path)
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")  # PEFT's, of names and patterns without effect
@pytest.mark.parametrize("family", TYPES)
def test_what_peft_adapts_is_adapted_here(family, tmp_path):
    names = [name for name, _ in tiny_model(family).named_parameters()]
    stacks = [name for name in names if re.search(r"experts\.(gate_up|down|up)_proj$", name)]
    last = stacks[-1]
    cases: dict[str, dict[str, Any]] = {
        "seven": {"target_modules": SEVEN},
        "layer": {"target_modules": ["o_proj", "out_proj"], "layers_to_transform": [1]},
        "pattern": {"target_modules": r".*(self_attn|mlp)\.(q_proj|o_proj|q_b_proj|out_proj)"},
        "one-stack": {"target_modules": [], "target_parameters": [last]},
        "ranks": {
            "target_modules": ["v_proj"],
            "target_parameters": [last.partition(".")[2], "experts.down_proj"],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
    }
    host = loraloom.attach(tiny_model(family))
    for name, settings in cases.items():
        expected = trained_by_peft(family, tmp_path / name, **settings)
        host.load(name, tmp_path / name)
        assert relative_error(logits(host, name), expected) < 1e-6, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("qwen3_moe", "model.layers.0.mlp.gate"),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate"),
        ("qwen3_next", "model.layers.0.linear_attn.in_proj_ba"),
    ],
)
def test_a_module_that_no_adapter_here_can_be_on_is_named(family, module, tmp_path):
    trained_by_peft(family, tmp_path, target_modules="all-linear")
    host = loraloom.attach(tiny_model(family))
    with pytest.raises(AdapterError, match=f"it adapts {re.escape(module)}, .* no routers"):
        host.load("a", tmp_path)


def test_a_listed_layer_without_tensors_is_missing(tmp_path):
    host = loraloom.attach(tiny_model("mixtral"))
    host.add("a", LoraConfig(rank=2, layers=(0,)))
    host.save("a", tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"layers_to_transform": None}))
    with pytest.raises(AdapterError, match=r"missing tensors: layers\.1\.self_attn"):
        host.load("b", tmp_path)


def test_a_single_word_means_linear_layers_and_experts_where_there_are_none():
    host = loraloom.attach(tiny_model("qwen2_moe"))
    adapter = host.add("a", LoraConfig(rank=2, target_modules=["down_proj"]))
    paths = {projection.path for projection in adapter.projections()}
    assert paths == {"mlp.shared_expert.down_proj"}
    host = loraloom.attach(tiny_model("mixtral"))
    with pytest.warns(UserWarning, match=r"down_proj names no linear layer.* experts\.down_proj"):
        adapter = host.add("a", LoraConfig(rank=2, target_modules=["down_proj"]))
    assert {projection.path for projection in adapter.projections()} == {"mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("settings", "ranks", "scalings"),
    [
        ({"rank_pattern": {r"experts\.down_proj": 3}}, (4, 3), (2.0, 16 / 3)),
        ({"rank_pattern": {r"gate_up_proj": 3}}, (3, 4), (16 / 3, 2.0)),
        ({"alpha_pattern": {"down_proj": 2}}, (4, 4), (2.0, 0.5)),
        ({"rank_pattern": {r"1\.mlp\.experts\.down_proj": 3}}, (4, 4), (2.0, 2.0)),
    ],
)
def test_a_pattern_on_one_of_the_experts_projections_leaves_the_other(
    settings, ranks, scalings, tmp_path
):
    config = LoraConfig(rank=8, alpha=16, target_modules="experts", **settings)
    host = loraloom.attach(tiny_model("qwen3_moe"))
    randomise(host.add("a", config))
    host.save("a", tmp_path)
    for adapter in (host.adapter("a"), host.load("b", tmp_path)):
        projections = {p.key: p for p in adapter.projections()}
        names = ("gate_up_proj", "down_proj")
        first = [projections[f"layers.0.mlp.experts.{name}"] for name in names]
        assert tuple(p.config.rank for p in first) == ranks
        assert tuple(p.config.scaling for p in first) == pytest.approx(scalings)
    assert torch.equal(logits(host, "a"), logits(host, "b"))
