"""PEFT loads what loraloom writes, and loraloom reads what PEFT saves."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from loraloom.adapters import LoraConfig
from loraloom.adapters.base import BaseInfo
from loraloom.formats import read_adapter, write_adapter
from loraloom.models.families import base_info, base_layers
from loraloom.models.structure import family_of
from tests.formats.tiny import assert_same_tensors, make_tensors
from tests.tiny import tiny_model

CONFIGS = [
    LoraConfig(rank=4, alpha=8, target_modules="attention"),
    LoraConfig(rank=4, alpha=8, rank_stabilized=True),
    LoraConfig(rank=4, alpha=6, weight_decomposition=True),
    LoraConfig(rank=2, alpha=3, weight_decomposition=True, rank_stabilized=True, init="gaussian"),
]


def info(model: PreTrainedModel) -> BaseInfo:
    family = family_of(model)
    return base_info(model, family, base_layers(model, family))


def load_with_peft(model: PreTrainedModel, directory) -> peft.PeftModel:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(model, directory)
    messages = [str(warning.message) for warning in caught]
    assert [text for text in messages if "is_gradient_checkpointing" not in text] == []
    return loaded


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_what_we_write(config, family, tmp_path):
    model = tiny_model(family, torch.float32)
    base = info(model)
    tensors = make_tensors(config, base)
    write_adapter(tmp_path, config, tensors, base)
    loaded = load_with_peft(model, tmp_path)
    state = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert_same_tensors(state, load_file(tmp_path / "adapter_model.safetensors"))
    layer = loaded.get_submodule(f"base_model.model.{base.layers_path}.0.{base.attention}")
    projection = layer.get_submodule(base.attention_projections[0])
    assert projection.scaling["default"] == pytest.approx(config.scaling)
    assert projection.use_dora["default"] == config.weight_decomposition


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_safetensors", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_we_read_what_peft_saves(config, use_safetensors, tmp_path):
    model = tiny_model("llama", torch.float32)
    base = info(model)
    targets = base.attention_projections
    targets = targets if config.target_modules == "attention" else targets + base.ffn_projections
    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha),
        target_modules=list(targets),
        use_dora=config.weight_decomposition,
        use_rslora=config.rank_stabilized,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model, peft_config)
    wrapped.save_pretrained(
        tmp_path, save_embedding_layers=False, safe_serialization=use_safetensors
    )
    read, tensors = read_adapter(tmp_path, base)
    assert read == config.model_copy(update={"target_modules": targets})
    weights = wrapped.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    key = "layers.1.self_attn.v_proj"
    assert torch.equal(tensors[f"{key}.lora_A"], weights.lora_A["default"].weight)
    assert torch.equal(tensors[f"{key}.lora_B"], weights.lora_B["default"].weight)
    if config.weight_decomposition:
        magnitude = weights.lora_magnitude_vector["default"].weight
        assert torch.equal(tensors[f"{key}.magnitude"], magnitude)
