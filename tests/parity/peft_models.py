"""PEFT's own model of an adapter of ours."""

from __future__ import annotations

import re

import peft
from torch import nn

from loraloom.adapters import LoraConfig
from loraloom.adapters.base import BaseInfo

PARTS = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def wrapped_by_peft(model: nn.Module, config: LoraConfig, base: BaseInfo) -> nn.Module:
    paths = [f"{base.attention}.{name}" for name in base.attention_projections]
    if config.target_modules == "all-linear":
        paths += [f"{base.ffn}.{name}" for name in base.ffn_projections]
    theirs = peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha),
        lora_dropout=config.dropout,
        target_modules=rf"{re.escape(base.layers_path)}\.\d+\.({'|'.join(map(re.escape, paths))})",
        use_dora=config.weight_decomposition,
        use_rslora=config.rank_stabilized,
    )
    return peft.get_peft_model(model, theirs).to(model.dtype)


def their_parameter(model: nn.Module, base: BaseInfo, name: str) -> nn.Parameter:
    path, _, part = name.removeprefix("layers.").rpartition(".")
    return model.get_parameter(f"base_model.model.{base.layers_path}.{path}.{PARTS[part]}")
