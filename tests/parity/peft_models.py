"""PEFT's own model of an adapter of ours."""

import re

import peft
import torch
from torch import nn

from loraloom.adapters import LoraConfig
from loraloom.adapters.contract import Adapter
from loraloom.base.blocks import BaseInfo
from tests.blocks import shapes_of

PARTS = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}


def wrapped_by_peft(model: nn.Module, config: LoraConfig, base: BaseInfo) -> nn.Module:
    is_whole = config.target_modules == "all-linear"
    blocks = [block.path for block in base.blocks if is_whole or block.kind == "attention"]
    paths = [path for path in shapes_of(base) if path.rpartition(".")[0] in blocks]
    theirs = peft.LoraConfig(
        r=config.rank,
        lora_alpha=int(config.alpha),
        lora_dropout=config.dropout,
        target_modules=rf"{re.escape(base.layers_path)}\.\d+\.({'|'.join(map(re.escape, paths))})",
        use_dora=config.weight_decomposition,
        use_rslora=config.rank_stabilized,
    )
    return peft.get_peft_model(model, theirs).to(model.dtype)


def their_parameter(
    model: nn.Module, base: BaseInfo, name: str, adapter: str = "default"
) -> nn.Parameter:
    path, _, part = name.removeprefix("layers.").rpartition(".")
    place = f"base_model.model.{base.layers_path}.{path}"
    return model.get_parameter(f"{place}.{PARTS[part]}.{adapter}.weight")


@torch.no_grad()
def copy_to_peft(model: nn.Module, base: BaseInfo, adapter: Adapter, name: str = "default") -> None:
    for key, tensor in adapter.tensors().items():
        their_parameter(model, base, key, name).copy_(tensor)
