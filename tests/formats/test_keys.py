from __future__ import annotations

import pytest

from loraloom.adapters import ExpertsConfig, LoraConfig, MixLoraConfig
from loraloom.adapters.keys import TensorKey, target_projections


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.q_proj.lora_A",
        "layers.12.mlp.down_proj.magnitude",
        "layers.3.mlp.router",
        "layers.3.mlp.up_proj.experts.7.lora_B",
    ],
)
def test_a_name_survives_parsing(name):
    assert str(TensorKey.parse(name)) == name


@pytest.mark.parametrize("name", ["layers.x.mlp.router", "layers.0.mlp.up_proj.weight", ""])
def test_other_names_are_not_ours(name):
    assert TensorKey.parse(name) is None


def test_groups_name_the_projections_of_their_block(base):
    targets = {
        group: target_projections(group, base) for group in ("attention", "ffn", "all-linear")
    }
    assert targets["attention"][0] == "self_attn.q_proj"
    assert targets["ffn"] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert targets["all-linear"] == targets["attention"] + targets["ffn"]


def test_a_dora_has_three_tensors_a_projection(base):
    config = LoraConfig(rank=4, target_modules=("k_proj",), weight_decomposition=True)
    shapes = config.tensor_shapes(base)
    assert shapes["layers.1.self_attn.k_proj.lora_A"] == (4, 64)
    assert shapes["layers.1.self_attn.k_proj.lora_B"] == (32, 4)
    assert shapes["layers.1.self_attn.k_proj.magnitude"] == (32,)
    assert len(shapes) == 6


def test_a_mixture_has_a_router_a_layer_and_experts_of_their_own_rank(base):
    config = MixLoraConfig(rank=4, num_experts=3, experts=ExpertsConfig(rank=2))
    shapes = config.tensor_shapes(base)
    assert shapes["layers.0.mlp.router"] == (3, 64)
    assert shapes["layers.0.self_attn.q_proj.lora_A"] == (4, 64)
    assert shapes["layers.0.mlp.down_proj.experts.2.lora_A"] == (2, 96)
    assert len(shapes) == 2 * (1 + 4 * 2 + 3 * 3 * 2)
