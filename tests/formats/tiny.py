"""Tiny base models and adapters with random weights, for tests of formats."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters import AdapterConfig, LoraConfig, MixLoraConfig
from loraloom.base.blocks import BaseInfo, BlockInfo
from loraloom.formats import write_adapter
from loraloom.host.host import Host

LORA, MIXTURE = LoraConfig(rank=2), MixLoraConfig(rank=2, num_experts=2)


ATTENTION = BlockInfo(
    path="self_attn",
    kind="attention",
    groups=(("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    shapes={"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)},
    layers=(0, 1),
)
FFN = BlockInfo(
    path="mlp",
    kind="ffn",
    groups=(("gate_proj", "up_proj"), ("down_proj",)),
    shapes={"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)},
    layers=(0, 1),
)


def llama_base(**changes) -> BaseInfo:
    """The base model of the fixtures' llama cases."""
    fields = {
        "name_or_path": "some-org/tiny-llama",
        "model_type": "llama",
        "layers_path": "model.layers",
        "blocks": (ATTENTION, FFN),
        "activation": "silu",
        "num_layers": 2,
        "hidden_size": 64,
        "num_parameters": 100_000,
        "fingerprint": "v2-0123456789abcdef",
        "modules": {"model.embed_tokens": {"weight": (97, 64)}, "lm_head": {"weight": (97, 64)}},
        "embedding": "model.embed_tokens",
        "head": "lm_head",
    }
    return BaseInfo(**(fields | changes))


def make_tensors(config: LoraConfig, base: BaseInfo, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = config.tensor_shapes(base)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(
    directory: Any, base: BaseInfo, config: AdapterConfig = LORA, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Write an adapter with random weights, and return these."""
    tensors = make_tensors(config, base, seed)
    write_adapter(directory, config, tensors, base, **options)
    return tensors


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


def edit_config(directory: Path, **changes) -> None:
    """Change fields of an adapter's configuration on disk."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def name_base(directory: Path, host: Host) -> None:
    """Save the configuration of an adapter's base model, and name it in the adapter's files."""
    base = directory.with_name("base")
    host.model.config.save_pretrained(base)
    edit_config(directory, base_model_name_or_path=str(base))
