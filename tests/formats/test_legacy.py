import json
import re

import torch

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.formats import read_adapter
from tests.blocks import names_of
from tests.formats.tiny import assert_same_tensors, make_tensors

OLD_PROJECTIONS = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}


def write_legacy(directory, tensors, rename, **fields):
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    torch.save(renamed, directory / "adapter_model.bin")
    config = {"bias": "none", "r": 2, "lora_alpha": 4, "lora_dropout": 0.05}
    config |= {"base_model_name_or_path": "some-org/tiny-llama", "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))


def old_projection(name: str) -> str:
    for new, old in OLD_PROJECTIONS.items():
        name = name.replace(new, old)
    return name


def old_mixture_name(name: str) -> str:
    name = old_projection(name).replace(".mlp.router", ".gate")
    name = re.sub(r"mlp\.(\w+)\.(experts\.\d+)", r"\2.\1", name)
    return f"mixlora.{name}.weight"


def old_plain_name(name: str) -> str:
    return f"base_model.model.model.{old_projection(name).replace('mlp', 'self_attn')}.weight"


def test_legacy_mixtures_are_read(base, tmp_path):
    targets = names_of(base)
    settings = {"rank": 2, "alpha": 4, "dropout": 0.05, "num_experts": 2}
    config = MixLoraConfig(**settings, target_modules=targets)
    tensors = make_tensors(config, base)
    fields = {"routing_strategy": "mixtral", "num_experts": 2, "act_fn": "silu", "top_k": 2}
    fields |= {"peft_type": "MIXLORA", "target_modules": [*map(old_projection, targets)]}
    write_legacy(tmp_path, tensors, old_mixture_name, **fields)
    read, read_tensors = read_adapter(tmp_path, base)
    assert read == config
    assert_same_tensors(read_tensors, tensors)


def test_legacy_plain_adapters_kept_the_ffn_under_attention(base, tmp_path):
    config = LoraConfig(rank=2, alpha=4, target_modules=("q_proj", "gate_proj", "down_proj"))
    tensors = make_tensors(config, base)
    fields = {"peft_type": "LORA", "target_modules": ["q_proj", "w1_proj", "w2_proj"]}
    write_legacy(tmp_path, tensors, old_plain_name, **fields)
    read, read_tensors = read_adapter(tmp_path, base)
    assert read.target_modules == ("q_proj", "gate_proj", "down_proj")
    assert_same_tensors(read_tensors, tensors)
