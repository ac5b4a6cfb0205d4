"""LoRAs for vLLM and SGLang: names and shapes that their loaders expect, and one update."""

import json

import pytest
import torch
from safetensors.torch import load_file

from loraloom.adapters import AdapterConfig, LoraConfig, MixLoraConfig
from loraloom.cli.main import main
from loraloom.errors import AdapterError
from loraloom.exports.converting import Program, convert
from tests.formats.tiny import name_base
from tests.tiny import relative_error, tiny_host, tiny_ids

IDS = tiny_ids(2)
LORA = LoraConfig(rank=2, expert_rank=2, alpha=6, target_modules=("attention", "experts"))
SHARED = LoraConfig(rank=2, shared_outer=True, target_modules=("experts",))
UNEVEN = LoraConfig(
    rank=2,
    alpha=6,
    rank_stabilized=True,
    rank_pattern={r"experts\.down_proj": 3},
    alpha_pattern={"q_proj": 5},
    target_modules=("attention", "experts"),
)


def converted(tmp_path, family: str, config: AdapterConfig, to: Program):
    host = tiny_host(family, {"a": config}, torch.float32)
    host.save("a", tmp_path / "a")
    name_base(tmp_path / "a", host)
    convert(tmp_path / "a", tmp_path / to, to)
    return host, load_file(tmp_path / to / "adapter_model.safetensors")


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_single_experts_come_back_to_the_bit(to, tmp_path):
    host, _ = converted(tmp_path, "qwen3_moe", LORA, to)
    again = host.load("again", tmp_path / to).tensors()
    for name, tensor in host.adapter("a").tensors().items():
        assert torch.equal(again[name], tensor), name


def test_factors_that_experts_share_are_each_ones(tmp_path):
    host, tensors = converted(tmp_path, "qwen3_moe", SHARED, "vllm")
    key = "base_model.model.model.layers.1.mlp.experts.{}.down_proj.lora_B.weight"
    assert torch.equal(tensors[key.format(0)], tensors[key.format(3)])
    host.load("again", tmp_path / "vllm")
    ours, theirs = (host(IDS, adapters=[name] * 2).logits for name in ("a", "again"))
    assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize("to", ["peft", "vllm"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_experts_without_a_lora_have_zeros_in_other_programs_files(to, is_shared, tmp_path):
    config = LoraConfig(
        rank=2,
        base_experts={0: (3, 1), 1: (0,)},
        shared_outer=is_shared,
        target_modules=("experts",),
    )
    host = tiny_host("qwen3_moe", {"a": config}, torch.float32)
    host.save("a", tmp_path / "a")
    convert(tmp_path / "a", tmp_path / to, to, host=host)
    adapter = host.load("again", tmp_path / to)
    assert adapter.config.base_experts is None
    ours, theirs = (host(IDS, adapters=[name] * 2).logits for name in ("a", "again"))
    assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_scales_and_ranks_are_folded(to, tmp_path):
    host, tensors = converted(tmp_path, "qwen3_moe", UNEVEN, to)
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {3}
    fields = json.loads((tmp_path / to / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (3, 3, False)
    assert not fields["rank_pattern"] | fields["alpha_pattern"]
    host.load("again", tmp_path / to)
    ours, theirs = (host(IDS, adapters=[name] * 2).logits for name in ("a", "again"))
    assert relative_error(theirs, ours) < 1e-5


@pytest.mark.parametrize(
    ("family", "to", "names"),
    [
        ("qwen3_moe", "vllm", "mlp.experts.3.gate_proj mlp.experts.3.down_proj"),
        ("mixtral", "vllm", "block_sparse_moe.experts.3.w1 block_sparse_moe.experts.3.w3"),
        ("mixtral", "sglang", "mlp.experts.3.gate_proj mlp.experts.3.up_proj"),
        ("gpt_oss", "vllm", "mlp.experts.base_layer mlp.experts"),
    ],
)  # fmt: skip
def test_names_are_those_that_the_engine_reads(family, to, names, tmp_path):
    _, tensors = converted(tmp_path, family, LORA, to)
    for name in (*names.split(), "self_attn.q_proj"):
        key = f"base_model.model.model.layers.1.{name}"
        matrices = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        assert matrices[0].dim() == matrices[1].dim() == 2
        assert len(matrices[0]) == matrices[1].shape[1]
    fields = json.loads((tmp_path / to / "adapter_config.json").read_text())
    assert ("target_parameters" in fields) == (family == "gpt_oss")
    assert isinstance(fields["target_modules"], list)


def test_sglang_gets_interleaved_rows_apart(tmp_path):
    host, tensors = converted(tmp_path, "gpt_oss", LORA, "sglang")
    lora_B = host.adapter("a").tensors()["layers.1.mlp.experts.gate_up_proj.lora_B"]
    up = tensors["base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"]
    assert torch.equal(up, lora_B[3, 1::2])
    with pytest.raises(AdapterError, match="which gpt_oss interleaves; save the adapter from PEFT"):
        host.load("again", tmp_path / "sglang")


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("qwen3_moe", {"weight_decomposition": True}, "does not load DoRA; .*--to merged"),
        ("qwen3_moe", {"target_modules": ("moe",)}, "next to a block.*`loraloom serve`"),
        ("qwen3_moe", {"target_modules": ("experts.down_proj",)}, "together, got down_proj at"),
        ("granitemoe", {}, "unknown for the type granitemoe"),
    ],
)
def test_what_an_engine_lacks_is_refused(family, config, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        converted(tmp_path, family, LORA.model_copy(update=config), "vllm")
    assert not (tmp_path / "vllm").exists()


def test_the_command_refuses_a_mixture(tmp_path, capsys):
    host = tiny_host("llama", {"a": MixLoraConfig(rank=2, num_experts=2)}, torch.float32)
    host.save("a", tmp_path / "a")
    name_base(tmp_path / "a", host)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "sglang"]) == 2
    assert "SGLang 0.5.23 does not load MixLoRA; serve" in capsys.readouterr().err
