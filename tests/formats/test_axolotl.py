"""Mixtures of axolotl's plug-in are read as what they are."""

import json

import pytest
import yaml
from safetensors.torch import save_file

from loraloom.adapters import ExpertsConfig, MixLoraConfig
from loraloom.errors import AdapterError, FormatError
from loraloom.formats import describe, read_adapter
from tests.blocks import names_of
from tests.formats.tiny import assert_same_tensors, llama_base, make_tensors

CONFIG = MixLoraConfig(
    rank=4,
    alpha=8,
    dropout=0.05,
    num_experts=3,
    experts=ExpertsConfig(
        rank=2, alpha=6, dropout=0.1, rank_stabilized=False, weight_decomposition=False
    ),
    router_aux_loss_coef=0.02,
    target_modules=names_of(llama_base()),
)
RUN = {
    "adapter": "mixlora",
    "lora_alpha": 8,
    "mixlora_num_experts": 3,
    "mixlora_top_k": 2,
    "mixlora_expert_lora_alpha": 6,
    "mixlora_expert_lora_dropout": 0.1,
    "mixlora_router_aux_loss_coef": 0.02,
}
SIDECAR = "mixlora_model.safetensors"
GIVEN = {"top_k": 2, "experts": {"alpha": 6, "dropout": 0.1}, "router_aux_loss_coef": 0.02}


def write(directory, run=RUN, **fields):
    """Write a mixture as axolotl does, and return its tensors by our keys."""
    tensors = make_tensors(CONFIG, llama_base())
    attention, experts = {}, {}
    for name, tensor in tensors.items():
        place = f"base_model.model.model.{name}.weight"
        if "self_attn" in name:
            attention[place] = tensor
        elif name.endswith("router"):
            experts[place.replace("router.weight", "router.gate.weight")] = tensor
        else:
            _, layer, _, projection, _, expert, part = name.split(".")
            own = f"{projection.removesuffix('_proj')}_{part.lower()}.weight"
            experts[f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{own}"] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    save_file(attention, directory / "adapter_model.safetensors")
    save_file(experts, directory / SIDECAR)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["v_proj", "q_proj", "k_proj", "o_proj"],
        "bias": "none",
        "peft_version": "0.21.2",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | fields))
    if run is not None:
        (directory / "config.yml").write_text(yaml.safe_dump(run))
    return tensors


def test_it_is_read_as_the_mixture_that_it_is(base, tmp_path):
    tensors = write(tmp_path)
    config, read = read_adapter(tmp_path, base)
    assert config == CONFIG
    assert_same_tensors(read, tensors)
    description = describe(tmp_path)
    assert (description["method"], description["layout"]) == ("MixLoRA", "axolotl")
    assert SIDECAR in description["file_bytes"]


def test_a_checkpoint_of_a_run_takes_the_runs_settings(base, tmp_path):
    write(tmp_path / "out" / "checkpoint-20", run=None)
    (tmp_path / "out" / "config.yml").write_text(yaml.safe_dump(RUN))
    assert read_adapter(tmp_path / "out" / "checkpoint-20", base)[0] == CONFIG


@pytest.mark.parametrize("run", [None, {"adapter": "lora"}, [1]])
def test_without_the_runs_settings_it_asks_for_them(run, base, tmp_path):
    tensors = write(tmp_path, run)
    with pytest.raises(FormatError, match=r"top_k and the experts' alpha are not in.*settings="):
        read_adapter(tmp_path, base)
    config, read = read_adapter(tmp_path, base, GIVEN)
    assert config == CONFIG
    assert_same_tensors(read, tensors)


@pytest.mark.parametrize(
    ("run", "fields", "message"),
    [
        (RUN | {"mixlora_top_k": 4}, {}, r"top_k must be in \[1, num_experts=3\], got 4"),
        (RUN, {"modules_to_save": ["lm_head"]}, "missing tensors: modules.lm_head.weight"),
    ],
)
def test_what_does_not_belong_together_is_refused(run, fields, message, base, tmp_path):
    write(tmp_path, run, **fields)
    with pytest.raises((AdapterError, FormatError), match=message):
        read_adapter(tmp_path, base)
