import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.adapters import LoraConfig
from loraloom.errors import FormatError
from loraloom.formats import read_adapter
from loraloom.formats.files import read_stored
from tests.formats.tiny import assert_same_tensors, edit_config, write


def test_magnitudes_are_read_with_and_without_the_suffix(base, tmp_path):
    tensors = write(tmp_path, base, LoraConfig(rank=2, weight_decomposition=True))
    path = tmp_path / "adapter_model.safetensors"
    suffix = "lora_magnitude_vector"
    save_file({k + ".weight" * k.endswith(suffix): v for k, v in load_file(path).items()}, path)
    assert_same_tensors(read_adapter(tmp_path, base)[1], tensors)


def test_a_pattern_of_modules_is_taken_from_the_tensors(base, tmp_path):
    write(tmp_path, base, LoraConfig(rank=2, target_modules=("q_proj", "v_proj")))
    edit_config(tmp_path, target_modules=r".*self_attn\.(q|v)_proj")
    assert read_adapter(tmp_path, base)[0].target_modules == ("q_proj", "v_proj")


def test_listed_modules_that_the_base_lacks_have_no_effect_as_in_peft(base, tmp_path):
    write(tmp_path, base, LoraConfig(rank=2, target_modules=("q_proj",)))
    edit_config(tmp_path, target_modules=["q_proj", "c_attn"])
    assert read_adapter(tmp_path, base)[0].target_modules == ("q_proj",)


def test_two_tensors_of_one_meaning_are_an_error(base, tmp_path):
    write(tmp_path, base, LoraConfig(rank=2, weight_decomposition=True))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_magnitude_vector"))
    save_file(tensors | {f"{name}.weight": tensors[name].clone()}, path)
    with pytest.raises(
        FormatError, match=r"only one tensor may be layers.*\.magnitude, got base_mo"
    ):
        read_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("lora_bias", True),
        ("a_field_of_the_future", {"on": True}),
        ("init_lora_weights", "pissa"),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_what_can_not_be_represented_is_an_error_that_names_the_field(field, value, base, tmp_path):
    write(tmp_path, base)
    edit_config(tmp_path, **{field: value})
    with pytest.raises(FormatError, match=f"`{field}` (must|is not supported)"):
        read_adapter(tmp_path, base)


def test_tensors_of_other_methods_are_unexpected(base, tmp_path):
    write(tmp_path, base)
    path = tmp_path / "adapter_model.safetensors"
    extra = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 4)}
    save_file(load_file(path) | extra, path)
    with pytest.raises(FormatError, match=r"tensors: .*lora_embedding_A; .*of decoder layers"):
        read_adapter(tmp_path, base)


def test_the_base_models_record_is_in_the_weights_header_not_in_the_config(base, tmp_path):
    write(tmp_path, base)
    assert "loraloom" not in json.loads((tmp_path / "adapter_config.json").read_text())
    record = read_stored(tmp_path).base
    assert record.fingerprint == base.fingerprint
    assert record.num_parameters == base.num_parameters


def test_a_record_by_a_newer_version_is_refused(base, tmp_path):
    write(tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"loraloom": '{"version": 2}'})
    with pytest.raises(FormatError, match="newer loraloom"):
        read_adapter(tmp_path, base)
