import pytest
from safetensors.torch import load_file, save_file

from loraloom.adapters import ExpertsConfig, MixLoraConfig
from loraloom.errors import FormatError
from loraloom.formats import read_adapter
from tests.blocks import names_of
from tests.formats.tiny import (
    MIXTURE,
    assert_same_tensors,
    edit_config,
    write,
)
from tests.tiny import changed

CONFIG = MixLoraConfig(
    rank=4,
    alpha=2.5,
    dropout=0.1,
    num_experts=2,
    target_modules=("v_proj", "down_proj"),
    weight_decomposition=True,
    rank_stabilized=True,
    init="gaussian",
    experts=ExpertsConfig(rank=2, alpha=3, dropout=0.2),
    router_init_std=0.1,
    router_jitter=0.05,
    router_aux_loss_coef=0.02,
    router_z_loss_coef=0.001,
    router_loss_scope="per_layer",
)


def test_what_is_written_is_read_back(base, tmp_path):
    tensors = write(tmp_path, base, CONFIG)
    read, read_tensors = read_adapter(tmp_path, base)
    assert read == CONFIG
    assert_same_tensors(read_tensors, tensors)


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        (
            {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.0},
            {"routing": "top_p", "top_p": 0.6},
        ),
        (
            {"routing_strategy": "mixlora-dynamic", "temperature": 0.5},
            {"routing": "top_p", "temperature": 0.5},
        ),
        (
            {"routing_strategy": "mixlora-switch", "expert_capacity": 16, "sparse_step": None},
            {"routing": "switch", "expert_capacity": 16},
        ),
        ({"routing_strategy": "mixlora-switch"}, {"routing": "switch", "expert_capacity": 32}),
    ],
)
def test_all_routings_of_the_reference_are_read(fields, settings, base, tmp_path):
    tensors = write(tmp_path, base, MIXTURE)
    edit_config(tmp_path, loraloom=None, top_k=None, **fields)
    read, read_tensors = read_adapter(tmp_path, base)
    targets = names_of(base)
    assert read == changed(MIXTURE, target_modules=targets, **settings)
    assert_same_tensors(read_tensors, tensors)


def test_settings_can_be_given_in_place_of_those_in_files(base, tmp_path):
    write(tmp_path, base, MIXTURE)
    config, _ = read_adapter(tmp_path, base, {"top_k": 1, "experts": {"dropout": 0.2}})
    assert (config.top_k, config.expert_config.dropout) == (1, 0.2)
    with pytest.raises(FormatError, match=r"with the given settings is not valid: .*top_n"):
        read_adapter(tmp_path, base, {"top_n": 1})


def test_lost_magnitudes_are_left_to_the_base_model(base, tmp_path):
    tensors = write(tmp_path, base, CONFIG)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "magnitude" not in k}, path)
    with pytest.warns(UserWarning, match="a DoRA without magnitudes, as saved by MoE-PEFT"):
        read, read_tensors = read_adapter(tmp_path, base)
    assert read == CONFIG
    assert_same_tensors(read_tensors, {k: v for k, v in tensors.items() if "magnitude" not in k})
    plain, _ = read_adapter(tmp_path, base, {"weight_decomposition": False})
    assert plain == changed(CONFIG, weight_decomposition=False)
